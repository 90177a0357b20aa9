"""More labels than people gave: an LLM judges recorded answers, and its verdicts become battles."""
