"""A model folder on disk, and how a text becomes one vector.

Nothing here reaches for the network: a folder that is not there is an error, not a name to look up.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .textfile import EmbedError

if TYPE_CHECKING:
    import torch

__all__ = ["Embedder", "ModelFolder"]

_TOKENIZER_FILES = (
    "tokenizer.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model",
    "spm.model", "tokenizer.model",
)  # fmt: skip
_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json",
                 "pytorch_model.bin", "pytorch_model.bin.index.json")  # fmt: skip


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EmbedError(f"model: {path} cannot be read as JSON ({error})") from None


@dataclass(frozen=True)
class ModelFolder:
    """A model on disk, plain Hugging Face or sentence-transformers, as its JSON files describe it.

    Attributes:
        path: what the user named.
        transformer: the folder with ``config.json``, weights and tokenizer (``path`` or below it).
        pooling: ``"mean"`` or ``"cls"``; another word where the folder asks for what is not built.
        normalize: whether the folder's own recipe ends with embeddings of unit length.
        max_length: tokens per text that the folder asks for, or None.
        prompt: text the folder puts before every input.
        lower_case: whether the folder lowers every input before the tokenizer sees it.
    """

    path: Path
    transformer: Path
    pooling: str
    normalize: bool
    max_length: int | None
    prompt: str
    lower_case: bool

    @classmethod
    def read(cls, path: Path) -> ModelFolder:
        """Looks at the folder without loading weights.

        Raises:
            EmbedError: no such folder, no config, weights or tokenizer in it, or a recipe with
                modules other than transformer, pooling and normalization.
        """
        if not path.is_dir():
            got = "is a file" if path.exists() else "does not exist"
            raise EmbedError(
                f"model: got {path}, which {got}; need a folder with config.json, weights and "
                "tokenizer (nothing is downloaded); try the folder that save_pretrained wrote"
            )
        modules = _read_json(path / "modules.json") if (path / "modules.json").is_file() else []
        kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
        unknown = sorted(set(kinds) - {"Transformer", "Pooling", "Normalize", "Dropout"})
        if unknown:
            raise EmbedError(
                f"model: {path / 'modules.json'} has {', '.join(unknown)}; need only Transformer, "
                "Pooling and Normalize; try sentence-transformers with filbert.convert"
            )
        places = {kind: path / module.get("path", "")
                  for kind, module in zip(kinds, modules, strict=True)}  # fmt: skip
        transformer = places.get("Transformer", path)
        for names in (("config.json",), _WEIGHT_FILES, _TOKENIZER_FILES):
            if not any((transformer / name).is_file() for name in names):
                raise EmbedError(
                    f"model: {transformer} has no {' or '.join(names)}; need a complete folder; "
                    "try model.save_pretrained(folder) and tokenizer.save_pretrained(folder)"
                )
        settings: dict[str, Any] = {}
        for name in sorted(transformer.glob("sentence_*_config.json")):
            settings.update(_read_json(name))
        pooling_file = places.get("Pooling", path / "1_Pooling") / "config.json"
        pooling = _read_json(pooling_file) if pooling_file.is_file() else {"pooling_mode": "mean"}
        return cls(
            path, transformer, _pooling_mode(pooling), "Normalize" in kinds,
            settings.get("max_seq_length"), _default_prompt(path, pooling),
            bool(settings.get("do_lower_case", False)),
        )  # fmt: skip

    def sha256(self) -> str:
        """A hash over every file that decides an embedding: configs, tokenizer, weights."""
        files: set[Path] = set()
        for folder in {self.path, self.transformer, *self.path.glob("*_Pooling")}:
            for pattern in ("*.json", "*.txt", "*.model", "*.safetensors", "*.bin"):
                files.update(file for file in folder.glob(pattern) if file.is_file())
        digest = hashlib.sha256()
        for file in sorted(files):
            digest.update(f"{file.relative_to(self.path)} {file.stat().st_size}\n".encode())
            with file.open("rb") as opened:
                while block := opened.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()


def _pooling_mode(config: dict[str, Any]) -> str:
    """One word from either form of sentence-transformers' pooling config."""
    if "pooling_mode" in config:
        mode = config["pooling_mode"]
        return mode if isinstance(mode, str) else "+".join(map(str, mode))
    flags = [name for name, on in config.items() if name.startswith("pooling_mode_") and on is True]
    names = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
    return "+".join(names.get(flag, flag.removeprefix("pooling_mode_")) for flag in flags) or "mean"


def _default_prompt(path: Path, pooling: dict[str, Any]) -> str:
    file = path / "config_sentence_transformers.json"
    config = _read_json(file) if file.is_file() else {}
    name = config.get("default_prompt_name")
    if name is None:
        return ""
    if not pooling.get("include_prompt", True):
        raise EmbedError(
            f"model: {file} sets the prompt {name!r} and 1_Pooling leaves it out of the mean; need "
            "a prompt that is pooled like text; try a copy of it without default_prompt_name"
        )
    return str(config.get("prompts", {}).get(name, ""))


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No bars and no load reports from transformers: what is wrong is checked and said here."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


class Embedder:
    """A model, its tokenizer and how texts become one vector each.

    Args:
        model: a base model (``last_hidden_state`` out); converted by :func:`filbert.convert` when
            ``converted`` is true, else run as it is over padded batches.
        tokenizer: the model's.
        pooling: ``"mean"`` or ``"cls"``.
        normalize: divide every embedding by its length.
        max_length: tokens kept of a text, special tokens included.
        prompt: put before every text.
        lower_case: lower every text first.
        converted: whether ``model`` holds filbert's packed encoder.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        pooling: str,
        normalize: bool,
        max_length: int,
        prompt: str = "",
        lower_case: bool = False,
        converted: bool = False,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.pooling = pooling
        self.normalize = normalize
        self.max_length = max_length
        self.prompt = prompt
        self.lower_case = lower_case
        self.converted = converted

    @classmethod
    def load(
        cls,
        folder: ModelFolder,
        *,
        dtype: str = "float32",
        pooling: str | None = None,
        normalize: bool | None = None,
        max_length: int | None = None,
        convert: bool = True,
    ) -> Embedder:
        """Loads weights and tokenizer from ``folder``; what is None follows the folder's recipe.

        Raises:
            EmbedError: the folder does not load, lacks weights the model needs, or does not fit
                what was asked.
            filbert.ConvertError: ``convert`` is true and the model cannot run packed.
        """
        pooling = pooling or folder.pooling
        if pooling not in ("mean", "cls"):
            raise EmbedError(
                f"model: {folder.path} pools by {pooling!r}; need 'mean' or 'cls'; try --pooling "
                "mean, if that is how you mean to use it"
            )
        model = _load_model(folder.transformer, dtype)
        tokenizer = _load_tokenizer(folder.transformer, model)
        limit = _position_limit(model)
        length = max_length or folder.max_length
        if length is None:
            length = min(limit, int(min(tokenizer.model_max_length, 1 << 30)))
        special = tokenizer.num_special_tokens_to_add()
        if not special < length <= limit:
            raise EmbedError(
                f"max length: got {length} tokens, need {special + 1} to {limit} for this model; "
                f"try --max-length {limit}"
            )
        if convert:
            from ..conversion.in_place import convert as swap_encoder

            swap_encoder(model)
        return cls(
            model, tokenizer, pooling=pooling, max_length=length, prompt=folder.prompt,
            normalize=folder.normalize if normalize is None else normalize,
            lower_case=folder.lower_case, converted=convert,
        )  # fmt: skip

    @property
    def dimension(self) -> int:
        """How many values an embedding has."""
        return int(self.model.config.hidden_size)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of every text, truncated and not padded."""
        cleaned = [self.prompt + text.strip() for text in texts]
        if self.lower_case:
            cleaned = [text.lower() for text in cleaned]
        if not cleaned:
            return []
        return self.tokenizer(
            cleaned, truncation=True, max_length=self.max_length, padding=False,
            return_attention_mask=False, return_token_type_ids=False,
        )["input_ids"]  # fmt: skip

    def pad(self, ids: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """``input_ids`` and ``attention_mask``, int64 ``[B, S]``, padded on the right."""
        import torch

        longest = max(map(len, ids))
        tokens = np.full((len(ids), longest), self.tokenizer.pad_token_id or 0, dtype=np.int64)
        mask = np.zeros_like(tokens)
        for row, sequence in enumerate(ids):
            tokens[row, : len(sequence)] = sequence
            mask[row, : len(sequence)] = 1
        return torch.from_numpy(tokens), torch.from_numpy(mask)

    def embed_batch(self, ids: Sequence[Sequence[int]]) -> np.ndarray:
        """Embeddings ``[B, N]`` float32 of one batch of token ids."""
        import torch

        tokens, mask = self.pad(ids)
        with torch.inference_mode():
            if self.converted:
                from ..conversion.pooling import embed

                pooled = embed(self.model, tokens, mask, self.pooling).float()
            else:
                hidden = self.model(input_ids=tokens, attention_mask=mask).last_hidden_state.float()
                if self.pooling == "cls":
                    pooled = hidden[:, 0]
                else:
                    weights = mask.unsqueeze(-1)
                    pooled = (hidden * weights).sum(1) / weights.sum(1)
            if (
                self.normalize
            ):  # in float32 for either dtype, so that lengths are 1 to its precision
                pooled = torch.nn.functional.normalize(pooled, dim=-1)
            return pooled.numpy()

    def embed_ids(
        self,
        ids: Sequence[Sequence[int]],
        batches: Sequence[Sequence[int]],
        on_batch: Callable[[int, int], object] = lambda texts, tokens: None,
    ) -> np.ndarray:
        """Embeddings ``[len(ids), N]`` float32 in the order of ``ids``.

        Args:
            ids: token ids per text.
            batches: which texts run together, see :func:`plan_batches`.
            on_batch: called with the batch's number of texts and of tokens after each batch.
        """
        rows = np.empty((len(ids), self.dimension), dtype=np.float32)
        for batch in batches:
            rows[batch] = self.embed_batch([ids[i] for i in batch])
            on_batch(len(batch), sum(len(ids[i]) for i in batch))
        return rows


def _load_model(folder: Path, dtype: str) -> Any:
    import torch

    try:
        from transformers import AutoModel
    except ImportError:
        raise EmbedError(
            "model: transformers is not installed, need it to load a model; "
            "try: pip install 'filbert[cli]'"
        ) from None
    try:
        with _quiet_transformers():
            model, loaded = AutoModel.from_pretrained(
                str(folder), dtype=getattr(torch, dtype), local_files_only=True,
                trust_remote_code=False, output_loading_info=True,
            )  # fmt: skip
    except Exception as error:  # transformers raises many kinds, all about what is in the folder
        raise EmbedError(
            f"model: {folder} does not load: {' '.join(str(error).split())[:600]}"
        ) from error
    # A pooler that was not saved is not used here; any other gap would be filled with noise.
    absent = sorted(name for name in loaded["missing_keys"] if not name.startswith("pooler."))
    if absent:
        raise EmbedError(
            f"model: {folder} lacks {len(absent)} weights of {type(model).__name__} (first: "
            f"{', '.join(absent[:3])}), need all of them; try the folder of a complete checkpoint"
        )
    return model.eval()


def _load_tokenizer(folder: Path, model: Any) -> Any:
    from transformers import AutoTokenizer

    try:
        with _quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
    except Exception as error:
        raise EmbedError(
            f"tokenizer: {folder} does not load: {' '.join(str(error).split())[:600]}"
        ) from error
    size = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > size:
        raise EmbedError(
            f"tokenizer: {folder} has {len(tokenizer)} tokens, need at most the {size} that the "
            "model has embeddings for; try the tokenizer that belongs to the model"
        )
    return tokenizer


def _position_limit(model: Any) -> int:
    """The longest sequence the position table holds; RoBERTa's begins after its padding index."""
    import torch

    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - first
    return int(getattr(model.config, "max_position_embeddings", 1 << 30))
