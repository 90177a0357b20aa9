"""Everything that speaks Prefect: the retraining loop as one flow over library and registry."""
