"""Serving many adapters on one frozen base model: a registry of adapters, engines that batch requests for all of them,
and an OpenAI-compatible HTTP API.

Import from here; the modules are internal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softtune.lazy import public_names

if TYPE_CHECKING:
    from softtune.serving.engine_config import EngineConfig
    from softtune.serving.folder import AdapterFolder
    from softtune.serving.http.app import Settings, create_app
    from softtune.serving.sampling import SamplingParams
    from softtune.serving.service import Service
else:
    __getattr__, __dir__ = public_names(
        __name__,
        {
            "AdapterFolder": "folder",
            "EngineConfig": "engine_config",
            "SamplingParams": "sampling",
            "Service": "service",
            "Settings": "http.app",
            "create_app": "http.app",
        },
        extra="serve",
    )

__all__ = ["AdapterFolder", "EngineConfig", "SamplingParams", "Service", "Settings", "create_app"]
