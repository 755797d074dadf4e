"""Makes one task's prompt of a multitask adapter a prompt tuning adapter of its own.

Internal: import from ``softtune``.
"""

from __future__ import annotations

from softtune import checkpoint
from softtune.errors import AdapterError
from softtune.methods import PromptTuningConfig, PromptTuningInit
from softtune.methods.initialization import PROMPT_KEY
from softtune.model import PeftModel


def add_task_adapter(model: PeftModel, task_id: int, adapter_name: str, source: str = "default") -> None:
    """Add a prompt tuning adapter that computes what a multitask adapter does for one of its tasks.

    It can be saved, served and trained like any other; its changes are no longer shared.

    Args:
        model: the model with the multitask adapter.
        task_id: the task, counted from 0.
        adapter_name: the new adapter's name.
        source: the multitask adapter's name.

    Raises:
        AdapterError: the source is no multitask adapter or has no such task, there is none of its name, or the new
            name is taken or invalid.
    """
    adapter = model.adapter(source).of_task(task_id)
    vectors = adapter.prompt().vectors
    if adapter.config.num_prompt_tasks is None or vectors is None:
        raise AdapterError(f"{source!r} has no tasks of its own", "use it as it is")
    kept = ("task_type", "base_model_name_or_path", "revision", "modules_to_save")
    fields = {name: getattr(adapter.config, name) for name in kept}
    config = PromptTuningConfig(num_virtual_tokens=len(vectors), prompt_tuning_init=PromptTuningInit.RANDOM, **fields)
    model.add_adapter(adapter_name, config)
    model.chat_templates[adapter_name] = adapter.chat_template
    checkpoint.fill(model.adapter(adapter_name), {PROMPT_KEY: vectors.detach(), **adapter.head_state()})
