"""Upload a model's folder to the hub of Hugging Face, with the token of the environment or of the login."""

import contextlib
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars, validate_repo_id

from mori.checkpoint import checkpoints
from mori.cli import Interrupted, RunFailed, UserError, bar_class, guarded, interruptible, one_line
from mori.config import PRESETS, ExportConfig
from mori.config.groups import HubConfig
from mori.model import loading
from mori.tracking.monitor import say
from mori.tracking.overview import command_words, flag_words
from mori.tracking.report.card import CARD

_SECONDS = 10
_CARD_BYTES = 1 << 20  # a longer card is not read
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"
# Weights of an earlier upload: transformers would load them instead of those that are divided into other files.
_STALE = ["model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"]


def push_folder(config: ExportConfig) -> None:
    """Upload the folder `config.model`. Raises UserError for what cannot be uploaded, and RunFailed if the upload fails."""
    name = config.model
    if name in PRESETS or not Path(name).is_dir():
        raise UserError(f"model {name} is no folder; push_to_hub uploads the folder of a trained model")
    loading.check_reachable(name)
    check(config, name)
    push(config, name)


def base_metadata(name: str) -> dict[str, str]:
    """What the hub knows of the model `name`, a folder or a name on the hub: `base_model`, its name there, and its licence.

    A folder has a name there if it is in the hub's cache, or if mori wrote its card, which says what it was trained from. What
    is not known, or cannot be read, is left out.
    """
    folder, metadata = Path(name), {}
    if name in PRESETS:
        return {}

    def load() -> None:
        readme = folder / CARD if folder.is_dir() else Path(huggingface_hub.hf_hub_download(name, CARD))
        if readme.is_file() and readme.stat().st_size < _CARD_BYTES:
            metadata.update(huggingface_hub.metadata_load(readme) or {})

    with contextlib.suppress(UserError):
        guarded("", lambda: interruptible(load, _SECONDS))
    base = name
    if folder.is_dir():
        cache = re.fullmatch(r"models--(.+)", folder.resolve().parent.parent.name)
        base = metadata.get("base_model") if "mori" in (metadata.get("tags") or []) else None
        base = cache[1].replace("--", "/") if cache and folder.resolve().parent.name == "snapshots" else base
    known = {"base_model": base, **{key: metadata.get(key) for key in ("license", "license_name", "license_link")}}
    return {key: value for key, value in known.items() if value and isinstance(value, str)}


def check(config: HubConfig, folder: str) -> str | None:
    """Ask the hub who the user is, without writing anything there; returns why it did not answer, if so.

    Raises UserError if an upload of `folder` would be refused: no token or a wrong one, one that only reads, a name that is
    invalid or in a namespace of others, or a public repository for a private model.
    """
    name = config.hub_model_id or Path(folder).resolve().name
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(
            f"hub_model_id: {one_line(error).rstrip('.')}; give --hub_model_id NAME, or USER/NAME"
        ) from None
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(variable, "").upper() in constants.ENV_VARS_TRUE_VALUES:
            raise UserError(
                f"push_to_hub: {variable} is set, so nothing is uploaded; unset it, or leave push_to_hub out"
            )

    def ask() -> None:
        if not huggingface_hub.get_token():  # in this thread: Colab keeps it where others do not reach
            raise UserError(f"push_to_hub: there is no token of the hub; {_LOGIN}")
        interruptible(lambda: _ask(config, name), _SECONDS)

    try:
        with _online():
            guarded("", ask)
    except UserError as mistake:
        error = _converted(mistake)
        if error is mistake:
            raise
        if _status(error) in (401, 403):
            raise UserError(f"push_to_hub: the hub refuses the token; {_LOGIN}") from None
        return _reason(error)
    return None


def _ask(config: HubConfig, name: str) -> None:
    """Raise UserError if the owner of the token may not write to the repository `name`."""
    account = HfApi().whoami()
    own, role_in = account["name"], {org["name"]: org.get("roleInOrg") for org in account.get("orgs", [])}
    if (account.get("auth") or {}).get("accessToken", {}).get("role") == "read":
        raise UserError(f"push_to_hub: the token of {own} only reads; make one that writes at {_tokens_page()}")
    namespace = name.split("/")[0] if "/" in name else own
    if namespace != own and role_in.get(namespace, "read") == "read":
        writable = [own, *(organization for organization, role in role_in.items() if role != "read")]
        raise UserError(f"hub_model_id: {namespace} is not yours to write to; yours: {', '.join(writable)}")
    _check_private(config, f"{namespace}/{name.split('/')[-1]}")


def _check_private(config: HubConfig, name: str) -> None:
    """Raise UserError if the model must stay private, but its repository exists and is public."""
    with contextlib.suppress(RepositoryNotFoundError):
        if config.hub_private_repo and not HfApi().model_info(name).private:
            raise UserError(
                f"hub_private_repo: {name} exists and is public; make it private in its settings, or take another --hub_model_id"
            )


def push(config: HubConfig, folder: str) -> None:
    """Upload all files of `folder`, which are the model; unchanged ones are not sent again.

    Of a checkpoint, the files that only a run reads stay here. Raises RunFailed with the reason and the command that repeats the
    upload, and Interrupted with the command.
    """
    path = Path(folder).resolve()
    command = [*command_words("export"), *flag_words("model", folder), "--push_to_hub"]
    command += flag_words("hub_model_id", config.hub_model_id) if config.hub_model_id else []
    if config.hub_private_repo is not None:
        command.append("--hub_private_repo" if config.hub_private_repo else "--no-hub_private_repo")
    folder = folder.rstrip("/")
    again = f"{folder}/ is complete; this uploads it: {shlex.join(command)}"

    def upload() -> str:
        api, name = HfApi(), config.hub_model_id or path.name
        name = name if "/" in name else f"{api.whoami()['name']}/{name}"
        say(f"uploading {folder}/ to {api.endpoint}/{name}")
        api.create_repo(name, private=config.hub_private_repo, exist_ok=True)
        _check_private(config, name)
        api.upload_folder(
            repo_id=name,
            folder_path=path,
            commit_message="Upload of mori",
            ignore_patterns=checkpoints.files_of_the_run(path),
            delete_patterns=_STALE,
        )
        return f"{api.endpoint}/{name}"

    try:
        with _online():
            if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:  # else the user's setting counts
                (enable_progress_bars if bar_class() else disable_progress_bars)()
            say(f"the model is on the hub: {guarded('', lambda: interruptible(upload))}")
    except KeyboardInterrupt:
        raise Interrupted(f"stopped while uploading; {again}") from None
    except UserError as mistake:
        raise RunFailed(f"not uploaded: {_reason(_converted(mistake))}; {again}") from None


@contextlib.contextmanager
def _online() -> Iterator[None]:
    """Ask the hub although it did not answer when the model was loaded: that may be hours ago."""
    before, huggingface_hub.constants.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE, False
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before


def _converted(mistake: UserError) -> BaseException:
    """The library's error that `guarded` converted to `mistake`; or `mistake`, if it is one of ours."""
    return mistake.__context__ if mistake.__suppress_context__ else mistake


def _causes(error: BaseException) -> list[BaseException]:
    """An error and what caused it, from the outside in."""
    return [error, *(_causes(error.__cause__) if error.__cause__ else [])]


def _response(error: BaseException):
    """The first error with the hub's answer, and the answer; None if it gave none."""
    return next(((e, e.response) for e in _causes(error) if getattr(e, "response", None) is not None), None)


def _status(error: BaseException) -> int | None:
    answer = _response(error)
    return answer and answer[1].status_code


def _reason(error: BaseException) -> str:
    """Why the hub did not do it, and what helps; without URLs, which may hold signatures."""
    answer = _response(error)
    if isinstance(error, UserError):
        return str(error)
    if not answer:
        return f"{HfApi().endpoint}: {one_line(_causes(error)[-1])}"
    failure, response = answer
    message = " ".join((getattr(failure, "server_message", None) or response.reason_phrase).split())[:200]
    advice = {401: f"; {_LOGIN}", 403: f"; the token must be one that writes, from {_tokens_page()}"}
    return f"the hub answers {response.status_code} {message}{advice.get(response.status_code, '')}"


def _tokens_page() -> str:
    return f"{HfApi().endpoint}/settings/tokens"
