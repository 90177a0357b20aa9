"""LiteLLM is an extra: without it its tests are skipped, and fail where CI is set."""

import importlib.util
import os

import pytest


def needs_litellm():
    """Skip the module that calls it, if LiteLLM is not installed; else keep LiteLLM offline."""
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    os.environ["LITELLM_MODE"] = "PRODUCTION"  # else it reads ./.env
    if importlib.util.find_spec("litellm") is None and not os.environ.get("CI"):
        pytest.skip("LiteLLM is not installed: pip install litellm", allow_module_level=True)
