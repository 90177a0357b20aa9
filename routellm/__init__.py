"""RouteLLM Ops: train, validate, register, promote and serve LLM routers.

Nothing heavy happens on import: import what you need from the modules named in the
package's folders (``routellm.snapshots``, ``routellm.routers``, ``routellm.evaluation`` ...).
"""

__version__ = "0.1.0"
