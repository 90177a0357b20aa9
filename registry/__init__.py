"""Everything that speaks MLflow: runs, registered versions, aliases, gates, the audit trail."""

from registry.client import Registry, VersionInfo, connect
from registry.gate import Decision, Gate

__all__ = ["Decision", "Gate", "Registry", "VersionInfo", "connect"]
