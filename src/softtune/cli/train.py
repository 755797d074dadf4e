"""``softtune train``: run one or several recipes. Every field of a recipe is also a flag.

What takes long to import is imported when the command runs, and not for its help text.
"""

from __future__ import annotations

from softtune.cli.console import quiet
from softtune.cli.flags import FIELDS, argument, option, overrides, with_flags, words


def command(
    recipes: list[str],
    resume: bool,
    resume_from: str | None,
    push_to_hub: bool,
    profile: bool,
    find_learning_rate: bool,
    **flags: str | None,
) -> None:
    """Train an adapter by a recipe, or those of several recipes at once, and show what came of it.

    Recipes that share a base model take less time and memory together than one after the other; a flag goes for all of
    them. Ctrl-C saves the runs for --resume.
    """
    from softtune.cli.runs import measure, run
    from softtune.training.recipe import Recipe

    quiet()
    changes = {**overrides(flags), **({"push_to_hub": True} if push_to_hub else {})}
    chosen = [Recipe.load(recipe, changes) for recipe in recipes]
    if profile or find_learning_rate:
        measure(chosen, resume or resume_from is not None, profile, find_learning_rate)
        return
    pushing = ["--push-to-hub"] if push_to_hub else []
    run(chosen, ["train", *recipes, *words(flags), *pushing], resume=resume_from or resume)


with_flags(
    command,
    [
        argument("recipes", list[str], help="The recipe, a YAML file; or several that share a base model."),
        option("resume", bool, False, help="Go on with an interrupted run."),
        option("resume_from", str | None, None, help="Go on from this checkpoint of it, such as checkpoint-100."),
        option("push_to_hub", bool, False, help=str(FIELDS["push_to_hub"].description)),
        option("profile", bool, False, help="Measure where a step's time goes, and save nothing."),
        option("find_learning_rate", bool, False, help="Try ever higher rates for up to 40 steps, and save nothing."),
    ],
)
