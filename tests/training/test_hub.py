"""What is pushed, and that the hub is asked before any work. The hub is a fake."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError
from tests.training.test_run import interrupt_at, no_work

from softtune import ConfigError, TrainingError
from softtune.experiments.compare import compare
from softtune.training import hub
from softtune.training.recipe import Recipe
from softtune.training.run import Report, train, train_all


class FakeHub:
    """Takes the place of ``HfApi``, with the parameters of its methods."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls: list[str] = []
        self.private: dict[str, bool | None] = {}
        self.errors: dict[str, Exception] = {}
        """By the method that raises it."""

    def __call__(self) -> FakeHub:
        return self

    def _called(self, method: str, **arguments: Any) -> None:
        self.calls.append(method)
        assert {*arguments} <= {*getattr(HfApi, method).__annotations__}
        if method in self.errors:
            raise self.errors[method]

    def whoami(self) -> dict[str, str]:
        self._called("whoami")
        return {"name": "me"}

    def create_repo(self, repo_id: str, **options: Any) -> SimpleNamespace:
        self._called("create_repo", **options)
        assert options["exist_ok"]
        name = repo_id if "/" in repo_id else f"me/{repo_id}"
        self.private[name] = options["private"]
        return SimpleNamespace(repo_id=name)

    def upload_folder(self, **options: Any) -> None:
        self._called("upload_folder", **options)
        left_out = [pattern.partition("/")[0] for pattern in options["ignore_patterns"]]
        target = self.folder / options["repo_id"]
        shutil.copytree(options["folder_path"], target, ignore=shutil.ignore_patterns(*left_out))


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    made = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(hub, "HfApi", made)
    return made


@pytest.fixture
def fields(fields: dict[str, Any]) -> dict[str, Any]:
    return {**fields, "epochs": 1, "push_to_hub": True}


def test_the_finished_folder_is_pushed(fields: dict[str, Any], fake: FakeHub) -> None:
    own = {"hub_model_id": "us/adapter", "hub_private_repo": True, "report_to": ["tensorboard"]}
    report = train(Recipe.from_fields({**fields, **own}))
    assert report.repository == "us/adapter"
    assert fake.private == {"us/adapter": True}
    pushed = {str(path.relative_to(fake.folder / "us/adapter")) for path in (fake.folder / "us/adapter").rglob("*")}
    assert pushed == {path.name for path in report.folder.iterdir()} - {"logs"}
    assert "model-index" in (fake.folder / "us/adapter" / "README.md").read_text()
    assert fake.calls == ["whoami", "create_repo", "upload_folder"]


def test_the_repository_is_ones_own_by_default(fields: dict[str, Any], fake: FakeHub) -> None:
    assert train(Recipe.from_fields({**fields, "ensemble": 2})).repository == "me/adapter"
    assert fake.private == {"me/adapter": None}
    assert (fake.folder / "me/adapter" / "2" / "adapter_model.safetensors").is_file()
    member = Recipe.from_adapter(Path(fields["output"], "2"))
    assert not member.push_to_hub  # made again, it would take the ensemble's place


def test_nothing_is_asked_of_the_hub_without(fields: dict[str, Any], fake: FakeHub) -> None:
    assert train(Recipe.from_fields({**fields, "push_to_hub": False})).repository is None
    assert not fake.calls


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        ("whoami", LocalTokenNotFoundError("no token"), "^push_to_hub needs a login to the hub: run hf auth login, or"),
        (
            "whoami",
            OSError("401\nexpired"),
            r"^the hub does not know you \(401 expired\): run hf auth login, or set HF",
        ),
        (
            "create_repo",
            OSError("403"),
            r"^adapter cannot be written on the hub \(403\): name another repository by hu",
        ),
    ],
)
def test_what_the_hub_refuses_is_told_before_any_work(
    fields: dict[str, Any], fake: FakeHub, method: str, error: Exception, message: str
) -> None:
    fake.errors[method] = error
    with pytest.raises(ConfigError, match=message) as caught:
        train(Recipe.from_fields(fields), progress=no_work)
    assert "\n" not in str(caught.value)
    assert not Path(fields["output"]).exists()


def test_without_a_login(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """By the hub's own client, which looks for a token before it connects."""
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: None)
    with pytest.raises(ConfigError, match=r"^push_to_hub needs a login to the hub"):
        train(Recipe.from_fields(fields), progress=no_work)


def test_an_upload_that_fails_leaves_the_adapter(fields: dict[str, Any], fake: FakeHub) -> None:
    fake.errors["upload_folder"] = OSError("connection lost")
    with pytest.raises(
        TrainingError, match=r"saved in .*adapter, and not pushed \(connection lost\): upload it by hf up"
    ):
        train(Recipe.from_fields(fields))
    assert Recipe.from_adapter(fields["output"]).push_to_hub


def test_two_recipes(fields: dict[str, Any], tmp_path: Path, fake: FakeHub) -> None:
    recipes = [Recipe.from_fields({**fields, "output": str(tmp_path / name / "adapter")}) for name in "ab"]
    with pytest.raises(ConfigError, match="adapter is the repository of 2 recipes: give each a hub_model_id"):
        train_all(recipes, progress=no_work)
    named = [Recipe.from_fields({**recipe.model_dump(), "hub_model_id": f"me/{i}"}) for i, recipe in enumerate(recipes)]
    named[1] = named[1].model_copy(update={"push_to_hub": False, "hub_model_id": None})
    first, second = train_all(named)
    assert isinstance(first, Report)
    assert isinstance(second, Report)
    assert (first.repository, second.repository) == ("me/0", None)


def test_an_interrupted_run_is_pushed_when_it_is_finished(fields: dict[str, Any], fake: FakeHub) -> None:
    """Also where only the command that goes on says so."""
    recipe = Recipe.from_fields({**fields, "push_to_hub": False})
    train(recipe, progress=interrupt_at(3))
    assert train(Recipe.from_fields(fields), resume=True).repository == "me/adapter"


def test_an_experiment_is_not_pushed(fields: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="an experiment is not pushed: set push_to_hub to false"):
        compare(Recipe.from_fields({**fields, "output": str(tmp_path / "out")}), ["prefix-tuning"], progress=no_work)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hub_model_id": "a b"}, "hub_model_id is 'a b': Repo id must"),
        ({"hub_model_id": "me/x", "push_to_hub": False}, "hub_model_id names what push_to_hub uploads to: set it too"),
        ({"hub_private_repo": True, "push_to_hub": False}, "hub_private_repo is for what push_to_hub uploads to: set"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(fields: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Recipe.from_fields({**fields, **changes})
    assert "\n" not in str(caught.value)
