"""An OpenAI-compatible HTTP API for the served adapters, and a page to try them."""

from softtune.extras import require

require("serve")
