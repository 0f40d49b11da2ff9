"""The start-up table: what was loaded, in which formats, and where it listens."""

from collections.abc import Callable

import msgspec

from engine.loader import LoadedModel
from engine.speculation.setup import Speculation
from server.logs import LogFormat


def start_table(loaded: LoadedModel, name: str, log_format: LogFormat) -> Callable[[str], str]:
    """The table as a function of the address, which is known once the socket listens.

    What it returns holds no reference to the model.
    """
    num_tokens = loaded.num_kv_blocks * loaded.core.block_size
    if log_format == "json":
        fields = {
            "message": "listening",
            "model": name,
            "weights_bytes": loaded.weights_bytes,
            "formats": loaded.formats,
            "quantization_reason": loaded.quantization_reason,
            "kv_dtype": loaded.kv_dtype,
            "kv_dtype_reason": loaded.kv_dtype_reason,
            "kv_blocks": loaded.num_kv_blocks,
            "kv_tokens": num_tokens,
            "kv_reason": loaded.num_blocks_reason,
            "max_model_len": loaded.max_model_len,
            "max_model_len_reason": loaded.max_model_len_reason,
            "threads": loaded.num_threads,
            "isa": loaded.isa,
            "speculation": loaded.speculation.mode,
            "drafters": loaded.speculation.drafters,
            "drafters_unavailable": loaded.speculation.unavailable,
        }
        return lambda address: msgspec.json.encode(fields | {"address": address}).decode()
    rows = (
        ("model", name),
        ("weights", f"{loaded.weights_bytes / 1e6:.1f} MB"),
        ("formats", f"{loaded.formats} ({loaded.quantization_reason})"),
        ("KV dtype", f"{loaded.kv_dtype} ({loaded.kv_dtype_reason})"),
        (
            "KV cache",
            f"{loaded.num_kv_blocks} blocks, {num_tokens} tokens, "
            f"{loaded.ledger.kv_bytes / 1e6:.1f} MB ({loaded.num_blocks_reason}), "
            f"{loaded.num_kept_blocks} for text of ended requests",
        ),
        ("max length", f"{loaded.max_model_len} tokens ({loaded.max_model_len_reason})"),
        ("threads", str(loaded.num_threads)),
        ("ISA", loaded.isa),
        ("speculation", _drafters(loaded.speculation)),
    )

    def with_address(address: str) -> str:
        return "\n".join(f"{label:<11} {value}" for label, value in (*rows, ("address", address)))

    return with_address


def _drafters(speculation: Speculation) -> str:
    if speculation.mode == "off":
        return "off (--speculation)"
    missing = "".join(f"; no {name}: {why}" for name, why in speculation.unavailable.items())
    return f"{speculation.mode}: {', '.join(speculation.drafters)}{missing}"
