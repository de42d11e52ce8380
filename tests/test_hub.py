"""Uploads to the hub, against a server that answers as the hub does and records what it receives."""

import base64
import hashlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, flags, run_script
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import _http

from mori.cli import Interrupted, RunFailed, UserError, parse
from mori.config import ExportConfig, GenerateConfig, TrainConfig
from mori.export import hub
from mori.train import train

TOKEN = "hf_secret"
ENDPOINTS = ("whoami", "create", "tree", "preupload", "validate", "batch", "put", "commit")


class Hub(ThreadingHTTPServer):
    """A hub with the account `mori`, who writes in the organization `studio` and reads in `library`."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.role = "write"
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.blobs: dict[str, bytes] = {}
        self.calls: list[str] = []
        self.failures: dict[str, object] = {}  # by endpoint: a status, "cut", or "interrupt" (one Ctrl-C, then cuts)

    def handle_error(self, request, client_address):
        """Connections that a test cuts are no errors of the server."""


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def reply(self, answer, status: int = 200) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def answer(self) -> None:
        body, parts = self.rfile.read(int(self.headers.get("Content-Length", 0))), self.path.split("?")[0].split("/")
        name = next((name for name in ENDPOINTS if any(part.startswith(name) for part in parts)), "")
        name = "put" if self.command == "PUT" else name
        self.server.calls.append(name)
        failure = self.server.failures.get(name)
        if failure == "interrupt":
            self.server.failures[name] = "cut"
            os.kill(os.getpid(), signal.SIGINT)
            threading.Event().wait(0.5)  # until the main thread has noticed
        if failure in ("cut", "interrupt"):
            self.connection.shutdown(socket.SHUT_RDWR)
        elif failure:
            self.reply({"error": f"no {name} today"}, failure)
        elif name != "put" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.reply({"error": "Invalid username or password."}, 401)
        else:
            getattr(self, name or "repository")(body, "/".join(parts[3:5]))

    do_GET = do_POST = do_PUT = answer

    def whoami(self, body, _):
        organizations = [{"name": "studio", "roleInOrg": "write"}, {"name": "library", "roleInOrg": "read"}]
        auth = {"type": "access_token", "accessToken": {"displayName": "laptop", "role": self.server.role}}
        self.reply({"type": "user", "name": "mori", "orgs": organizations, "auth": auth})

    def create(self, body, _):
        wanted = json.loads(body)
        name = f"{wanted['organization'] or 'mori'}/{wanted['name']}"
        exists = name in self.server.repositories
        self.server.repositories.setdefault(name, {})
        if not exists:
            self.server.private[name] = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.reply({"url": f"{self.server.url}/{name}", "name": name}, 409 if exists else 200)

    def repository(self, body, name):
        exists = name in self.server.repositories
        private = self.server.private.get(name, False)
        about = {"id": name, "sha": "a" * 40, "siblings": [], "tags": [], "private": private}
        self.reply(about if exists else {}, 200 if exists else 404)

    def tree(self, body, name):
        files = self.server.repositories[name]
        self.reply([{"type": "file", "path": path, "size": len(files[path]), "oid": "a" * 40} for path in files])

    def preupload(self, body, name):
        files = self.server.repositories[name]
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                "oid": oid(file["path"], files[file["path"]]) if file["path"] in files else None,
            }
            for file in json.loads(body)["files"]
        ]
        self.reply({"files": modes})

    def validate(self, body, _):
        """The library sends a README.md here before it uploads it."""
        card = json.loads(body)
        valid = card["repoType"] == "model" and ModelCard(card["content"]).data.pipeline_tag == "text-generation"
        self.reply({"errors": [] if valid else [{"message": "no card"}], "warnings": []})

    def batch(self, body, _):
        href = f"{self.server.url}/blobs"
        objects = json.loads(body)["objects"]
        for wanted in objects:
            if wanted["oid"] not in self.server.blobs:
                wanted["actions"] = {"upload": {"href": f"{href}/{wanted['oid']}"}}
        self.reply({"transfer": "basic", "objects": objects})

    def put(self, body, _):
        self.server.blobs[self.path.split("/")[-1]] = body
        self.reply({})

    def commit(self, body, name):
        files = self.server.repositories[name]
        for line in map(json.loads, body.splitlines()):
            path = line["value"].get("path")
            if line["key"] == "file":
                files[path] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                files[path] = self.server.blobs[line["value"]["oid"]]
            elif line["key"] == "deletedFile":
                del files[path]
        self.reply({"success": True, "commitOid": "b" * 40, "commitUrl": f"{self.server.url}/{name}/commit/{'b' * 40}"})


def oid(path: str, content: bytes) -> str:
    """The name of a file's content: in Git LFS for weights, else in git."""
    if path.endswith(".safetensors"):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.fixture
def server(monkeypatch):
    """A hub that this process and its children use, with a token that it knows, and no waiting between attempts."""
    with Hub() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None, time=lambda: 0.0))
        environment = {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, "NO_PROXY": "127.0.0.1"}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("HF_HUB_OFFLINE")
        yield server
        server.shutdown()


@pytest.fixture
def brain(small_model, tmp_path) -> Path:
    """A copy of the small model's folder."""
    return Path(shutil.copytree(small_model, tmp_path / "brain"))


@pytest.fixture
def quick(settings) -> dict:
    """The fields of a run of two steps that is uploaded."""
    short = {"max_steps": 2, "eval_strategy": "no", "save_steps": 2, "push_to_hub": True}
    return {**settings, **short, "hub_model_id": "mori/brain"}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def push(brain: Path, name: str = "mori/brain", **changed) -> None:
    hub.push_folder(ExportConfig(model=str(brain), push_to_hub=True, hub_model_id=name, **changed))


def repeated(line: str) -> subprocess.CompletedProcess:
    """Run the command that the line of a failed upload ends with."""
    command = line.split("this uploads it: ")[1].strip()
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    return subprocess.run(
        words, capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )


# ------------------------------------------------------------------------------------------------ what is uploaded
def test_train_uploads_the_published_folder_and_nothing_stores_the_token(server, quick, tmp_path):
    done = run_script("train.py", *flags({k: v for k, v in quick.items() if k != "push_to_hub"}), "--push_to_hub")
    assert done.returncode == 0 and "%|" not in done.stderr, done.stderr  # no bar in a pipe
    assert f"the model is on the hub: {server.url}/mori/brain" in done.stdout
    assert server.repositories == {"mori/brain": contents(tmp_path / "brain")}
    assert not [path for path in contents(tmp_path).values() if TOKEN.encode() in path]
    config = json.loads((tmp_path / "runs/run/config.json").read_text(encoding="utf-8"))
    assert config["push_to_hub"] is True and config["hub_model_id"] == "mori/brain"


def test_export_uploads_the_folder_under_its_name_and_no_unchanged_file_again(server, brain):
    done = run_script("export.py", "--model", "brain", "--push_to_hub", "--hub_private_repo", cwd=brain.parent)
    assert done.returncode == 0, done.stderr
    assert server.repositories == {"mori/brain": contents(brain)} and server.private == {"mori/brain": True}
    assert [path.name for path in brain.parent.iterdir()] == ["brain"]  # no GGUF file
    server.calls.clear()
    push(brain)
    assert server.repositories == {"mori/brain": contents(brain)} and not {"put", "commit"} & set(server.calls)


def test_push_replaces_weights_that_are_divided_otherwise_and_keeps_files_of_the_user(server, brain):
    earlier = {"README.md": b"mine", "model-00001-of-00002.safetensors": b"1", "model.safetensors.index.json": b"{}"}
    server.repositories["studio/brain"] = dict(earlier)
    push(brain, "studio/brain")
    assert server.repositories["studio/brain"] == {"README.md": b"mine", **contents(brain)}


def test_push_of_a_checkpoint_leaves_out_what_only_the_run_reads(server, quick, tmp_path):
    train(TrainConfig(**{**quick, "push_to_hub": False, "hub_model_id": ""}))
    [checkpoint] = (tmp_path / "runs/run/checkpoints").iterdir()
    push(checkpoint)
    uploaded, there = server.repositories["mori/brain"], contents(checkpoint)
    assert there.keys() - uploaded.keys() == {"optimizer.safetensors", "state.json", "manifest.json"}
    assert uploaded == {name: there[name] for name in uploaded} and "model.safetensors" in uploaded


# ------------------------------------------------------------------------------------------------- before the run
@pytest.mark.parametrize(
    "name, problem",
    [
        ("", "hub_model_id: .*'b r'.*; give --hub_model_id NAME, or USER/NAME"),
        ("a/b/c", "hub_model_id: .*'a/b/c'"),
        ("mori/otaknyé", "hub_model_id: .*'mori/otaknyé'; give --hub_model_id"),
        ("someone/brain", "hub_model_id: someone is not yours to write to; yours: mori, studio$"),
        ("library/brain", "hub_model_id: library is not yours to write to"),
    ],
)
def test_check_refuses_a_name_that_the_hub_would_refuse(server, quick, tmp_path, name, problem):
    quick |= {"hub_model_id": name, "output_dir": str(tmp_path / "b r")}
    with pytest.raises(UserError, match=problem):
        train(TrainConfig(**quick))
    assert server.repositories == {} and not (tmp_path / "runs/run").exists()


def test_check_refuses_a_token_that_is_missing_or_wrong_or_only_reads(server, brain, monkeypatch):
    config = ExportConfig(push_to_hub=True)
    assert hub.check(config, str(brain)) is None
    server.role = "read"
    with pytest.raises(UserError, match=f"token of mori only reads; make one that writes at {server.url}/settings"):
        hub.check(config, str(brain))
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(UserError, match="push_to_hub: the hub refuses the token; log in with `hf auth login`, or set"):
        hub.check(config, str(brain))
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(brain / "no_token"))
    with pytest.raises(UserError, match="push_to_hub: there is no token of the hub; log in with `hf auth login`, or"):
        hub.check(config, str(brain))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        hub.check(config, str(brain))


@pytest.mark.parametrize(
    "model, problem", [("mini", "is no folder"), ("someone/brain", "is no folder"), ("", "config")]
)
def test_push_folder_refuses_what_is_no_model_folder(server, tmp_path, model, problem):
    with pytest.raises(UserError, match=problem):
        push(model or tmp_path)
    assert server.calls == []


def test_private_model_is_not_uploaded_to_a_public_repository(server, brain):
    server.repositories["mori/brain"] = {}
    problem = "hub_private_repo: mori/brain exists and is public; make it private in its settings, or take another"
    with pytest.raises(UserError, match=problem):
        push(brain, hub_private_repo=True)
    server.failures["whoami"] = 500  # nothing is known before the upload
    with pytest.raises(RunFailed, match=f"^not uploaded: {problem}"):
        push(brain, hub_private_repo=True)
    assert server.repositories == {"mori/brain": {}}
    server.private["mori/brain"] = True
    push(brain, hub_private_repo=True)
    assert server.repositories == {"mori/brain": contents(brain)}


def test_run_goes_on_without_an_answer_and_uploads_at_its_end(server, quick, capsys, tmp_path):
    """The hub is down at the start: it answers from the evaluation on."""
    server.failures["whoami"] = 503
    assert train(TrainConfig(**quick))["steps"] == 2
    warning = "WARNING: the hub answers 503 no whoami today; the upload is tried at the end of the run"
    assert warning in capsys.readouterr().out
    assert server.repositories == {"mori/brain": contents(tmp_path / "brain")}


# --------------------------------------------------------------------------------------------------- a failed push
@pytest.mark.parametrize("failure", [401, 403, 500, "cut"])
@pytest.mark.parametrize("endpoint", ENDPOINTS[1:])
def test_failed_push_names_the_reason_and_the_command(server, brain, endpoint, failure):
    (brain / "README.md").write_text("---\npipeline_tag: text-generation\n---\n")
    server.failures[endpoint] = failure
    with pytest.raises(RunFailed) as failed:
        push(brain, hub_private_repo=False)
    line, words = str(failed.value), " --push_to_hub --hub_model_id mori/brain --no-hub_private_repo"
    reason = f"the hub answers {failure} " if failure != "cut" else f"{server.url}: "
    assert line.startswith(f"not uploaded: {reason}") and line.endswith(words) and "\n" not in line, line
    assert f"{brain}/ is complete; this uploads it: python -m mori export --model {brain} " in line
    assert ("HF_TOKEN" in line) == (failure == 401) and ("settings/tokens" in line) == (failure == 403)
    server.failures.clear()
    push(brain)
    assert server.repositories == {"mori/brain": contents(brain)}


def test_failed_push_after_a_training_exits_1_and_both_commands_repeat_it(server, quick, capsys, tmp_path):
    """The folder's name is quoted for the shell. The model and the summary are complete; the command of the run uploads again."""
    folder = tmp_path / "it's a brain"
    words = ["train.py", *flags({**{k: v for k, v in quick.items() if k != "push_to_hub"}, "output_dir": folder})]
    server.failures["create"] = 403
    failed = run_script(*words, "--push_to_hub")
    assert failed.returncode == 1 and "Traceback" not in failed.stderr, failed.stderr
    line = failed.stderr.splitlines()[-1]
    assert line.startswith("train.py: failed: not uploaded: the hub answers 403 no create today")
    assert json.loads((tmp_path / "runs/run/summary.json").read_text(encoding="utf-8"))["steps"] == 2
    server.failures.clear()
    assert repeated(line).returncode == 0 and server.repositories == {"mori/brain": contents(folder)}
    server.repositories.clear()
    train(TrainConfig(**{**quick, "output_dir": str(folder)}))
    assert "is finished (2 steps)" in capsys.readouterr().out
    assert server.repositories == {"mori/brain": contents(folder)}


def test_hub_that_cannot_be_reached_is_a_warning_before_and_a_failure_after(
    server, quick, monkeypatch, capsys, tmp_path
):
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        address = f"http://127.0.0.1:{nobody.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    with pytest.raises(
        RunFailed, match=rf"^not uploaded: {address}: .*Connection refused; .*/brain/ is complete; this"
    ):
        train(TrainConfig(**quick))
    assert f"WARNING: {address}: " in capsys.readouterr().out
    assert (tmp_path / "runs/run/summary.json").is_file() and (tmp_path / "brain/model.safetensors").is_file()


def test_interrupted_push_ends_at_once_and_prints_the_command(server, quick, tmp_path):
    """Ctrl-C is not kept until a step is saved, as in the training."""
    server.failures["preupload"] = "interrupt"
    with pytest.raises(
        Interrupted, match="^stopped while uploading; .* this uploads it: python -m mori export --model "
    ):
        train(TrainConfig(**quick))
    assert (tmp_path / "runs/run/summary.json").is_file() and server.repositories == {"mori/brain": {}}


# ----------------------------------------------------------------------------------------------------------- flags
@pytest.mark.parametrize("flag_name", ["--hub_token", "--token", "--push_to_hub_token", "--hf_token"])
def test_token_on_the_command_line_is_refused_and_not_repeated(settings, flag_name, tmp_path):
    done = run_script("train.py", *flags(settings), f"{flag_name}={TOKEN}")
    assert done.returncode == 2 and "HF_TOKEN" in done.stderr and TOKEN not in done.stderr + done.stdout
    assert not (tmp_path / "runs").exists()


def test_export_refuses_settings_of_a_file_beside_push_to_hub():
    mistakes = ExportConfig(push_to_hub=True, outtype="q8_0", output="x.gguf").mistakes()
    assert [mistake.split("; ")[1] for mistake in mistakes] == ["leave outtype out", "leave output out"]


@pytest.mark.parametrize(
    "words, expected",
    [
        ("--push_to_hub --hub_repo studio/x --private", {"hub_model_id": "studio/x", "hub_private_repo": True}),
        ("--push_to_hub --hub_model_id x --hub_strategy end", {"hub_model_id": "x", "hub_private_repo": None}),
        (
            "--hub_strategy checkpoint",
            "hub_strategy: checkpoints are not uploaded; --push_to_hub uploads the trained model",
        ),
        ("--push_to_hub_organization studio", "is a part of the name: --hub_model_id ORGANIZATION/NAME"),
        ("--hub_private_repo", "hub_private_repo is for an upload; add --push_to_hub, or leave hub_private_repo out"),
    ],
)
def test_hub_flags_of_trainer_are_taken_or_answered(words, expected):
    for cls in (TrainConfig, ExportConfig):
        if isinstance(expected, str):
            with pytest.raises(UserError, match=expected):
                parse(cls, "", words.split())
        else:
            config = parse(cls, "", words.split())
            assert config.push_to_hub and {name: getattr(config, name) for name in expected} == expected
    with pytest.raises(UserError, match="this command uploads nothing|unknown flag"):
        parse(GenerateConfig, "", words.split())
