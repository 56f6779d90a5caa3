"""Models from the Hugging Face hub: fetched once, read from its cache afterwards."""

from collections.abc import Iterable
from pathlib import Path

FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
COPIES = ["*/*", "consolidated*", "*.fp16[.-]*", "*.bf16[.-]*", "adapter_*"]  # other sets of the weights


def download(name: str, *, words: Iterable[str] = ()) -> Path:
    """The local copy of a hub model ("org/name" or "org/name@revision"), fetched where it is not yet in the cache.

    Raises: FileNotFoundError, which says what was tried, if there is no such model or no network.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        options = {"allow_patterns": FILES, "ignore_patterns": COPIES}
        return Path(snapshot_download(repository, revision=revision or None, **options))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"no model {name!r}: it is none of the words {', '.join(words)}, there is no folder "
            f"{Path(name).expanduser().absolute()}, and the Hugging Face hub did not give it ({type(error).__name__}). "
            'Check the name and the connection, download it once and pass its folder, or use load_lm("bundled")'
        ) from error
