"""The adapter to MLflow: runs with live metrics, agents as logged models and model versions, aliases, traces.

MLflow ids and version numbers are locators; an agent is its digest, kept in the tag `forebay.digest`. Nothing else of ours
imports mlflow.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, lru_cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Self
from urllib.parse import urlsplit
from urllib.request import url2pathname

from tasks.core.digest import digest_files, digest_tree
from tasks.core.errors import NotFound, Unavailable
from tasks.core.locks import file_lock
from tasks.promotion.drift import Held
from tasks.promotion.mlmodel import lay_out
from tasks.promotion.promote import Office

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, LoggedModel, Run
    from mlflow.entities.model_registry import ModelVersion

DIGEST_TAG = "forebay.digest"
KEY_TAG = "forebay.key"
_DECISIONS = "decision"  # folder of a run's artifacts
_AUDITS = "audit"
_GATE, _AUDIT = "Gate:", "Audit:"
_OURS = (_GATE, _AUDIT)  # how the paragraphs of a description begin that Forebay wrote
_MODELS = "models:/"
_MODEL_ID = re.compile(r"m-[0-9a-f]+")
_FLUSH_SECONDS = 5.0
_FLUSH_METRICS = 500  # MLflow takes at most 1000 in one batch


@dataclass(frozen=True)
class DatasetRef:
    """A dataset version as an MLflow input: its name, its root (what identifies it), and where DVC has it."""

    name: str
    root: str
    path: str
    rev: str
    md5: str


@dataclass(frozen=True)
class Registered:
    """A version in MLflow: its number there, its logged model, and the run that trained it (None: base)."""

    version: int
    model_id: str
    run_id: str | None


class RunSink:
    """Live metrics and files of one MLflow run; metrics go out in batches, with at most five seconds' delay.

    Used as a context manager it ends the run, as FAILED if an exception passes through.
    """

    def __init__(self, client: MlflowClient, run_id: str, model_id: str | None = None) -> None:
        self.run_id = run_id
        self._client = client
        self._model_id = model_id
        self._pending: list[Any] = []
        self._sent = time.monotonic()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record the values of one step."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._pending += [
            Metric(name, float(value), now, step, model_id=self._model_id) for name, value in metrics.items()
        ]
        if len(self._pending) >= _FLUSH_METRICS or time.monotonic() - self._sent > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Send what is pending."""
        for start in range(0, len(self._pending), _FLUSH_METRICS):
            self._client.log_batch(self.run_id, metrics=self._pending[start : start + _FLUSH_METRICS])
        self._pending = []
        self._sent = time.monotonic()

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Keep a copy of a file or a folder with the run."""
        log = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
        log(self.run_id, str(path), folder)

    def close(self, status: str = "FINISHED") -> None:
        """Send what is pending and end the run as FINISHED, FAILED or KILLED."""
        self.flush()
        self._client.set_terminated(self.run_id, status)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close("FINISHED" if kind is None else "FAILED")


class Registry:
    """MLflow at a tracking `uri`: a SQLite file, another database, or an http server.

    Args:
        artifacts: folder for the files of experiments that are made here; an http server chooses its own.
        locks: folder of the workspace's lock files.
        office: the registered model that versions and aliases are of: "agent" or "reward".
    """

    def __init__(self, uri: str, artifacts: Path, locks: Path, office: Office = "agent") -> None:
        self.uri = uri
        self.office = office
        self._artifacts = artifacts
        self._locks = locks

    def for_office(self, office: Office) -> Registry:
        """Return the same MLflow for another registered model."""
        return Registry(self.uri, self._artifacts, self._locks, office)

    def prepare(self) -> None:
        """Create or migrate the store; several processes may do so at once.

        MLflow itself migrates at first use, where processes that come at the same time have broken one
        another's tables.
        """
        if not self._is_database:
            return
        with self._lock("mlflow-store"):
            utils: Any = import_module("mlflow.store.db.utils")
            from mlflow.store.model_registry.dbmodels import models as _registry_tables  # noqa: F401  (fills metadata)
            from mlflow.store.tracking.dbmodels import models as _tracking_tables  # noqa: F401

            logging.getLogger("alembic").setLevel(logging.WARNING)
            logging.getLogger(utils.__name__).setLevel(logging.WARNING)
            utils._make_parent_dirs_if_sqlite(self.uri)
            engine = utils.create_sqlalchemy_engine_with_retry(self.uri)
            if utils._is_empty_database(engine):
                utils._initialize_tables(engine)
            else:
                utils._upgrade_db(engine)
            engine.dispose()

    def run(
        self,
        experiment: str,
        key: str,
        *,
        name: str,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        dataset: DatasetRef | None = None,
        model_id: str | None = None,
    ) -> RunSink:
        """Open the run with this content key, or take it up again where it exists.

        Args:
            dataset: recorded as the run's input, one manifest for all its shards.
            model_id: ties the run's metrics to this logged model.
        """
        from mlflow.entities import Param, RunTag

        found = self._find_run(experiment, key)
        if found is not None:
            if found.info.status != "RUNNING":
                self._client.update_run(found.info.run_id, "RUNNING")
            return RunSink(self._client, found.info.run_id, model_id)
        run = self._client.create_run(
            self._experiment(experiment), run_name=name, tags={KEY_TAG: key, **(tags or {})}
        )
        run_id = run.info.run_id
        self._client.log_batch(run_id, params=[Param(k, str(v)) for k, v in (params or {}).items()])
        if dataset is not None:
            self._client.log_inputs(run_id, [self._dataset_input(dataset)])
            self._client.log_batch(run_id, tags=[RunTag("forebay.dataset", dataset.root)])
        return RunSink(self._client, run_id, model_id)

    def register(
        self,
        files: Path,
        digest: str,
        *,
        run_id: str | None = None,
        params: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        tags: Mapping[str, str] | None = None,
        dataset: DatasetRef | None = None,
        among: Collection[str] | None = None,
    ) -> Registered:
        """Make the folder `files` a version of this office; the same digest is the same version.

        An agent is a Hugging Face folder, and plain MLflow loads it with transformers.

        The files are hard-linked into the logged model where it lies on the same file system, else copied or
        uploaded. A crash at any point leaves nothing that a second call does not complete. Tags prove nothing, as
        anybody can write them: a logged model that is there already is taken up again only if it is of the same run
        and, its files written anew, holds those of `digest` and no others; a version only if it serves that one.

        Args:
            digest: of the files (`digest_files`).
            metrics: tied to the logged model and to `dataset`; kept only where there is a run.
            among: logged models that may be taken up again; any by default.
        """
        with self._lock("mlflow-register"):
            model = self._taken_up(files, digest, run_id, among)
            if model is None:
                model = self._client.create_logged_model(
                    self._experiment(f"{self.office}s"),
                    name=self.office,
                    source_run_id=run_id,
                    tags={**_texts(tags or {}), DIGEST_TAG: digest},
                    params=_texts(params or {}),
                    model_type=self.office,
                )
                self._fill(model, files)
            if str(model.status) != "READY":
                if run_id is not None:
                    self._tie(model, run_id, metrics or {}, dataset)
                self._client.finalize_logged_model(model.model_id, "READY")
            with _existing_ignored():
                self._client.create_registered_model(self.office)
            for version in self._versions_of(digest):
                same_run = (version.run_id or None) == run_id
                if same_run and self._model_of(version.source or "") == model.model_id:
                    return Registered(int(version.version), model.model_id, run_id)
            # A database store looks model ids up through the process-wide tracking URI, which is not ours.
            local = self._is_database
            version = self._client.create_model_version(
                self.office,
                model.artifact_location if local else f"models:/{model.model_id}",
                run_id=run_id,
                tags={**_texts(tags or {}), DIGEST_TAG: digest, "forebay.model": model.model_id},
                model_id=None if local else model.model_id,
            )
            return Registered(int(version.version), model.model_id, run_id)

    def find(self, digest: str) -> Registered | None:
        """Return the first version that is tagged with this digest, None where there is none."""
        found = next(iter(self._versions_of(digest)), None)
        if found is None:
            return None
        return Registered(int(found.version), found.tags.get("forebay.model", ""), found.run_id or None)

    def note(self, run_id: str, metrics: Mapping[str, float]) -> None:
        """Add single values to a run, ended or not."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(run_id, metrics=[Metric(k, float(v), now, 0) for k, v in metrics.items()])

    def tag(self, version: int, tags: Mapping[str, str]) -> None:
        """Set tags of a version."""
        for name, value in tags.items():
            self._client.set_model_version_tag(self.office, str(version), name, value)

    def versions(self) -> dict[int, Held] | None:
        """Return all versions, None where the registered model itself is gone."""
        with _absent_ignored():
            self._client.get_registered_model(self.office)
            found: dict[int, Held] = {}
            token = None
            while True:
                page = self._client.search_model_versions(f"name = '{self.office}'", page_token=token)
                found |= {
                    int(v.version): Held(v.tags.get(DIGEST_TAG), self._model_of(v.source or "")) for v in page
                }
                token = page.token
                if not token:
                    return found
        return None

    def served(self, version: int) -> str | None:
        """Return the digest of the files that a version really serves, None where that cannot be told.

        What a server keeps itself is downloaded for it.
        """
        from mlflow.exceptions import MlflowException

        try:
            source = self._place(version)
        except MlflowException:
            return None
        return self._held_digest(source)

    def open_file(self, version: int, name: str) -> BinaryIO:
        """Open a file of a version as MLflow's artifact store has it; what a server keeps is downloaded for it.

        Args:
            name: relative to the folder of the agent.

        Raises:
            FileNotFoundError: MLflow has no such version, or the version no such file.
            Unavailable: MLflow or its artifact store does not answer.
        """
        from mlflow.artifacts import download_artifacts
        from mlflow.exceptions import MlflowException

        self._require_store()
        try:
            source = self._place(version)
            place = urlsplit(source)
            if place.scheme in ("", "file"):
                folder = Path(url2pathname(place.path))
                if not folder.exists() and not self._artifacts.exists():
                    raise Unavailable(f"MLflow's artifact store {self._artifacts} is not there.")
                return (folder / "model" / name).open("rb")
            with TemporaryDirectory() as aside:  # an open file outlives its name
                got = download_artifacts(
                    artifact_uri=f"{source}/model/{name}", dst_path=aside, tracking_uri=self.uri
                )
                return Path(got).open("rb")
        except FileNotFoundError:
            raise
        except (MlflowException, OSError) as error:
            absent = getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST"
            if absent or self._lacks(version, name):
                raise FileNotFoundError(name) from error
            says = " ".join(str(error).split())
            raise Unavailable(
                f"MLflow at {self.uri} could not give {self.office}/{version}: {says}"
            ) from error

    def trace(self) -> dict[str, str]:
        """Return what MLflow knows of the last change of the registered model: when, and sometimes who."""
        with _absent_ignored():
            model = self._client.get_registered_model(self.office)
            stamp = model.last_updated_timestamp
            when = datetime.fromtimestamp(stamp / 1000, UTC).isoformat() if stamp else None
            newest = max(
                model.latest_versions or [], key=lambda v: v.last_updated_timestamp or 0, default=None
            )
            who = None if newest is None else newest.user_id
            return {name: value for name, value in {"changed": when, "user": who}.items() if value}
        return {}

    def show_decision(self, digest: str, page: Path, *, decision: str, verdict: str, says: str) -> str | None:
        """Keep the page of a decision with the run that made a version, and say the verdict at the version; safe to repeat.

        A description that somebody wrote at the version stays as it is.

        Args:
            digest: of the version's files.
            page: HTML file; its name in MLflow is decision/<decision>.html.

        Returns:
            The page's route in MLflow's UI, None where there is no such version or no run made it (a base model).
        """
        found = self.find(digest)
        if found is None:
            return None
        route = self._keep_page(found, page, f"{_DECISIONS}/{decision}.html")
        self.tag(found.version, {"forebay.verdict": verdict, "forebay.decision": decision})
        self._describe(found.version, _GATE, f"**{verdict}**. {says}", "The decision", route)
        return route

    def decision_route(self, digest: str, decision: str) -> str | None:
        """Return the route of a kept page in MLflow's UI, None where nothing is kept."""
        found = self.find(digest)
        return None if found is None else self._route(found, f"{_DECISIONS}/{decision}.html")

    def show_audit(self, digest: str, page: Path, *, time: str, verdict: str, says: str) -> str | None:
        """Keep the page of an audit with the run that made a version, and say its result at the version; safe to repeat.

        A newer page of the same name takes the place of the one before. A description that somebody wrote stays.

        Returns:
            As `show_decision`; the page's name in MLflow is audit/<name of the file>.
        """
        found = self.find(digest)
        if found is None:
            return None
        route = self._keep_page(found, page, f"{_AUDITS}/{page.name}")
        self.tag(
            found.version,
            {"forebay.audit": f"{verdict} {time}", **({"forebay.audit.page": route} if route else {})},
        )
        self._describe(found.version, _AUDIT, f"**{verdict}**, {time}. {says}", "The audit", route)
        return route

    def _keep_page(self, found: Registered, page: Path, name: str) -> str | None:
        """Copy a page to `name` among the artifacts of a version's run; return its route, None where there is no run."""
        if found.run_id is None:
            return None
        folder, _, file = name.rpartition("/")
        with TemporaryDirectory() as place:
            named = Path(place) / file
            shutil.copyfile(page, named)
            self._client.log_artifact(found.run_id, str(named), folder)
        return self._route(found, name)

    def _route(self, found: Registered, name: str) -> str | None:
        """Return the route of an artifact of a version's run in MLflow's UI, None where it is not there."""
        if found.run_id is None:
            return None
        kept = self._client.list_artifacts(found.run_id, name.rpartition("/")[0])
        if all(file.path != name for file in kept):
            return None
        experiment = self._client.get_run(found.run_id).info.experiment_id
        return f"#/experiments/{experiment}/runs/{found.run_id}/artifacts/{name}"

    def _describe(self, version: int, opening: str, says: str, link: str, route: str | None) -> None:
        """Write one paragraph of a version's description; our others stay, and so does all that somebody else wrote."""
        written = self._client.get_model_version(self.office, str(version)).description or ""
        if written and not written.startswith(_OURS):
            return
        ours = {part.partition(" ")[0]: part for part in written.split("\n\n") if part}
        ours[opening] = f"{opening} {says}" + (f" [{link}]({route})" if route else "")
        text = "\n\n".join(ours[name] for name in _OURS if name in ours)
        self._client.update_model_version(self.office, str(version), text)

    def digest(self, version: int) -> str | None:
        """Return the digest of a version's files, None where there is no such version."""
        with _absent_ignored():
            return self._client.get_model_version(self.office, str(version)).tags.get(DIGEST_TAG)
        return None

    def aliases(self) -> dict[str, int]:
        """Return {alias: version}."""
        with _absent_ignored():
            return {a: int(v) for a, v in self._client.get_registered_model(self.office).aliases.items()}
        return {}

    def set_alias(self, alias: str, version: int) -> None:
        """Point `alias` at `version`, in one step for readers."""
        self._client.set_registered_model_alias(self.office, alias, str(version))

    def delete_alias(self, alias: str) -> None:
        """Remove `alias`; nothing where it is absent."""
        with _absent_ignored():
            self._client.delete_registered_model_alias(self.office, alias)

    def traces(self, experiment: str, filter_string: str | None = None) -> Iterator[dict[str, Any]]:
        """Yield the traces of an experiment, oldest first, as the dictionaries that MLflow exports.

        Raises:
            NotFound: there is no such experiment.
        """
        found = self._client.get_experiment_by_name(experiment)
        if found is None:
            raise NotFound(f"MLflow at {self.uri} has no experiment {experiment!r}.")
        token = None
        while True:
            page = self._client.search_traces(
                locations=[found.experiment_id],
                filter_string=filter_string,
                max_results=100,
                order_by=["timestamp_ms ASC"],
                page_token=token,
            )
            yield from (trace.to_dict() for trace in page)
            token = page.token
            if not token:
                return

    @cached_property
    def _client(self) -> MlflowClient:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        if not self._is_database:
            _answering(self.uri)
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)

    def _place(self, version: int) -> str:
        """Return where the files of a version are, as MLflow has it."""
        source: str = self._client.get_model_version(self.office, str(version)).source or ""
        if source.startswith(_MODELS):
            source = self._client.get_logged_model(source.removeprefix(_MODELS)).artifact_location
        return source

    def _lacks(self, version: int, name: str) -> bool:
        """Tell whether the artifact store answers, and has no such file: a failed download does not say why."""
        from mlflow.artifacts import list_artifacts
        from mlflow.exceptions import MlflowException

        path = f"model/{name}"
        try:
            folder = f"{self._place(version)}/{path.rpartition('/')[0]}"
            found = list_artifacts(artifact_uri=folder, tracking_uri=self.uri)
        except (MlflowException, OSError):
            return False
        return all(Path(item.path).name != Path(name).name for item in found)

    def _require_store(self) -> None:
        """Refuse at once where the store is gone: MLflow would make an empty one, or try a server for minutes."""
        if not self._is_database:
            _answering(self.uri)
        path = self.uri.removeprefix("sqlite:///")
        if path != self.uri and not Path(path).exists():
            raise Unavailable(f"MLflow's store {path} is not there; `forebay reconcile` makes it again.")

    @property
    def _is_database(self) -> bool:
        return not self.uri.startswith(("http://", "https://"))

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        with file_lock(self._locks / f"{name}.lock", what="the MLflow store"):
            yield

    def _experiment(self, name: str) -> str:
        found: Experiment | None = self._client.get_experiment_by_name(name)
        if found is None:
            with self._lock("mlflow-experiment"), _existing_ignored():
                # Without a location MLflow would put files under the current directory of the first caller.
                place = (self._artifacts / name).resolve().as_uri() if self._is_database else None
                return self._client.create_experiment(name, artifact_location=place)
            found = self._client.get_experiment_by_name(name)
            assert found is not None
        return found.experiment_id

    def _find_run(self, experiment: str, key: str) -> Run | None:
        runs = self._client.search_runs(
            [self._experiment(experiment)], f"tags.`{KEY_TAG}` = '{key}'", max_results=1
        )
        return runs[0] if runs else None

    def _versions_of(self, digest: str) -> list[ModelVersion]:
        found = self._client.search_model_versions(
            f"name = '{self.office}' AND tags.`{DIGEST_TAG}` = '{digest}'"
        )
        return sorted(found, key=lambda v: int(v.version))

    def _model_of(self, source: str) -> str:
        """Return the logged model whose files a version's source is, exactly; "" where it is none's.

        A folder may have any name, so the name of one only says which logged model to ask where its files are.
        """
        if source.startswith(_MODELS):
            return source.removeprefix(_MODELS)
        for part in urlsplit(source).path.split("/"):
            if _MODEL_ID.fullmatch(part):
                with _absent_ignored():
                    if self._client.get_logged_model(part).artifact_location == source:
                        return part
        return ""

    def _taken_up(
        self, files: Path, digest: str, run_id: str | None, among: Collection[str] | None
    ) -> LoggedModel | None:
        """Return a logged model that an earlier call left, complete and proven to hold the files of `digest`."""
        experiment = self._experiment(f"{self.office}s")
        for model in self._client.search_logged_models([experiment], f"tags.`{DIGEST_TAG}` = '{digest}'"):
            allowed = among is None or model.model_id in among
            if allowed and (model.source_run_id or None) == run_id:
                self._fill(model, files)
                if self._held_digest(model.artifact_location) == digest:
                    return model
        return None

    def _held_digest(self, location: str) -> str | None:
        """Return the digest of the files that a logged model's place holds, None where they cannot be read."""
        from mlflow.artifacts import download_artifacts
        from mlflow.exceptions import MlflowException

        place = urlsplit(location)
        try:
            if place.scheme in ("", "file"):
                return digest_files(digest_tree(Path(url2pathname(place.path)) / "model"))
            with TemporaryDirectory() as folder:
                got = download_artifacts(artifact_uri=location, dst_path=folder, tracking_uri=self.uri)
                return digest_files(digest_tree(Path(got) / "model"))
        except (MlflowException, OSError):
            return None

    def _fill(self, model: LoggedModel, files: Path) -> None:
        whose: Any = {"office": self.office, "model_id": model.model_id, "run_id": model.source_run_id}
        place = urlsplit(model.artifact_location)
        if place.scheme in ("", "file"):
            lay_out(Path(url2pathname(place.path)), files, **whose)
            return
        staging = files.parent / f".{files.name}.upload"
        try:
            lay_out(staging, files, **whose)
            self._client.log_model_artifacts(model.model_id, str(staging))
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _tie(
        self, model: LoggedModel, run_id: str, metrics: Mapping[str, float], dataset: DatasetRef | None
    ) -> None:
        from mlflow.entities import LoggedModelOutput, Metric

        outputs = self._client.get_run(run_id).outputs
        known = {output.model_id for output in outputs.model_outputs} if outputs else set()
        if model.model_id not in known:
            self._client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
        of = {} if dataset is None else {"dataset_name": dataset.name, "dataset_digest": _short(dataset.root)}
        now = int(time.time() * 1000)
        values = [Metric(k, float(v), now, 0, model_id=model.model_id, **of) for k, v in metrics.items()]
        self._client.log_batch(run_id, metrics=values)

    def _dataset_input(self, dataset: DatasetRef) -> Any:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source = dvc_source_class()(dataset.path, dataset.rev, dataset.md5, dataset.root)
        entity = Dataset(dataset.name, _short(dataset.root), source._get_source_type(), source.to_json())
        tags = [InputTag("mlflow.data.context", "training"), InputTag("forebay.root", dataset.root)]
        return DatasetInput(entity, tags)


@lru_cache(maxsize=1)
def dvc_source_class() -> Any:
    """Return (and make known to MLflow) the dataset source of type `dvc`: {path, rev, md5, root}."""
    from mlflow.data.dataset_source import DatasetSource
    from mlflow.data.dataset_source_registry import register_dataset_source

    class DvcSource(DatasetSource):
        """A dataset in a DVC repository; `root` is its Forebay identity, the rest says where DVC has it."""

        def __init__(self, path: str, rev: str, md5: str, root: str) -> None:
            self.path, self.rev, self.md5, self.root = path, rev, md5, root

        @staticmethod
        def _get_source_type() -> str:
            return "dvc"

        def load(self) -> str:
            """Return the path in the repository; `dvc get` with the revision brings the bytes."""
            return self.path

        @staticmethod
        def _can_resolve(raw_source: Any) -> bool:
            return False  # never guessed from a path: made from a manifest only

        @classmethod
        def _resolve(cls, raw_source: Any) -> DvcSource:
            raise NotImplementedError

        def to_dict(self) -> dict[str, Any]:
            return {"path": self.path, "rev": self.rev, "md5": self.md5, "root": self.root}

        @classmethod
        def from_dict(cls, source_dict: dict[Any, Any]) -> DvcSource:
            return cls(**source_dict)

    register_dataset_source(DvcSource)  # type: ignore[arg-type]
    return DvcSource


def _answering(uri: str) -> None:
    """Refuse at once where nobody listens; MLflow itself would retry for minutes."""
    parts = urlsplit(uri)
    address = (parts.hostname or "localhost", parts.port or (443 if parts.scheme == "https" else 80))
    try:
        socket.create_connection(address, timeout=5).close()
    except OSError as error:
        raise Unavailable(
            f"No MLflow server answers at {uri} ({error}); start it with `forebay up`."
        ) from None


@contextmanager
def _existing_ignored() -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


@contextmanager
def _absent_ignored() -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in values.items()}


def _short(root: str) -> str:
    """MLflow keeps 36 characters of a dataset's digest; the whole one is in the source and in the tags."""
    return root[:32]
