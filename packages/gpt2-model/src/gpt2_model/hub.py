"""Models on the Hugging Face hub, through its own library: cached, resumed, HF_HOME and HF_HUB_OFFLINE obeyed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gpt2_model.tensor_files import shard_names

HUB_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")
WEIGHTS_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def download(name: str) -> Path:
    """The folder in Hugging Face's cache with config.json and weights of "owner/model" or "owner/model@revision".

    Short names ("gpt2") stay as they are: the hub knows where they moved, and other programs have them in the
    cache under these names too. What is in the cache is not downloaded again; a download that breaks off goes on
    where it stopped, until five tries in a row bring nothing. On a terminal, huggingface_hub draws a bar.

    Raises:
        FileNotFoundError: the hub has no such model, it may not be read, or the hub cannot be reached.
        OSError: the download broke off.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache  # half a second, and only needed here
    from huggingface_hub.utils.logging import set_verbosity_error

    set_verbosity_error()  # type: ignore[no-untyped-call] # the errors below say it in one line
    repository, _, revision = name.partition("@")
    with _errors_of_one_line(name):
        config = Path(hf_hub_download(repository, "config.json", revision=revision or None))
        commit = config.parent.name  # the rest from the same one, even if the model is changed meanwhile

        def get(file: str) -> Path:
            return Path(hf_hub_download(repository, file, revision=commit))

        # Cached ones first: they need no network. Else the best one that the hub has.
        cached = [try_to_load_from_cache(repository, file, revision=commit) for file in WEIGHTS_FILES]
        weights = next((Path(path) for path in cached if isinstance(path, str)), None) or _first(get)
        if weights.suffix == ".json":
            for shard in sorted(set(shard_names(weights).values())):
                get(shard)
    return config.parent


def _first(get: Callable[[str], Path]) -> Path:
    """The best weights file that the model has."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for file in WEIGHTS_FILES[:-1]:
        try:
            return get(file)
        except LocalEntryNotFoundError:  # cannot be reached, which took it 23 seconds to find out
            raise
        except EntryNotFoundError:
            continue
    return get(WEIGHTS_FILES[-1])


@contextmanager
def _errors_of_one_line(name: str) -> Iterator[None]:
    """Those of huggingface_hub, which have many, as ours."""
    from huggingface_hub import errors

    try:
        yield
    except errors.LocalEntryNotFoundError:
        raise FileNotFoundError(
            f"{name} is no local model folder, not in Hugging Face's cache, and the hub cannot be reached"
        ) from None
    except errors.EntryNotFoundError:
        raise FileNotFoundError(f"{name} on the hub is no model folder: it lacks config.json or weights") from None
    except errors.RevisionNotFoundError:
        raise FileNotFoundError(f"{name}: the hub has this model, but not this revision of it") from None
    except errors.GatedRepoError:
        raise FileNotFoundError(
            f"{name} is gated: ask for access on its page on the hub, then `hf auth login` or set HF_TOKEN"
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise FileNotFoundError(
            f"{name} is neither a local model folder nor a model on the hub (such as {', '.join(HUB_NAMES)}); "
            "if it is private, `hf auth login` or set HF_TOKEN"
        ) from None
    except errors.HfHubHTTPError as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"{name} could not be downloaded from the hub: {reason}") from None
    except (OSError, ValueError):  # a full disk, no right to write, or an index that is none
        raise
    except Exception as error:  # of the HTTP library, which huggingface_hub changes and does not hide
        raise OSError(f"the download of {name} broke off again and again ({error}): try later") from None
