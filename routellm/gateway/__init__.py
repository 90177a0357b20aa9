"""The OpenAI-compatible gateway: asks the champion, sends the query on, says what it did."""
