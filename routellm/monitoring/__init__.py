"""What is watched while the loop runs by itself: freshness, drift, spend, gateways' health."""
