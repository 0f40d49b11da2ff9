"""`python -m server`: parse the options, load the model, print the start-up table, serve."""

import os
import sys
import time
from collections.abc import Callable

import msgspec

from engine.checkpoint.cache import cache_folder
from engine.config import ConfigError
from engine.deployment import deploy
from engine.loader import LoadedModel
from engine.loop import Engine
from engine.planning.quality import QualityMeasurer
from engine.tokenizer.errors import ChatTemplateError, TokenizerError
from engine.types import StepReport
from server.app import create_app
from server.control import Optimizer
from server.logs import start_logging, stop_logging
from server.options import Options, parse_options
from server.run import bind, run
from server.served import GenerationDefaults, ServedModel
from server.startup import start_table


def main(argv: list[str]) -> int:
    options = parse_options(argv, os.environ)
    listener = start_logging(options.log_format)
    code = 1
    try:
        code = _run(options)
    finally:
        stop_logging(listener, code)
    return code


def _run(options: Options) -> int:
    try:
        return _serve(options)
    except (ConfigError, TokenizerError, ChatTemplateError) as error:
        print(f"python -m server: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130  # interrupted while loading


def _serve(options: Options) -> int:
    sockets = bind(options.host, options.port)
    deployment = deploy(options.engine)
    loaded = deployment.loaded
    # Texts fill this sooner or later: no prompt should wait for the system to clear it.
    loaded.core.populate_kv(loaded.num_kept_blocks)
    optimizer = Optimizer(
        deployment,
        options.receipts or cache_folder() / "receipts.jsonl",
        measurer=QualityMeasurer(),
    )
    engine_settings = deployment.engine_settings
    model = _served(loaded, options.served_model_name)
    lines = start_table(loaded, model.name, options.log_format)
    # Nothing here may hold on to what an apply replaces: its memory could not be given back.
    first = [(loaded.core, loaded.speculation)]
    del deployment, loaded

    def make_engine(on_report: Callable[[StepReport], None]) -> Engine:
        def report(step: StepReport) -> None:
            optimizer.observer.observe(step)
            on_report(step)

        core, speculation = first.pop()
        engine = Engine(core, engine_settings, report, speculation)
        optimizer.attach(engine)
        return engine

    app = create_app(model, options.settings, make_engine, optimizer)
    return run(app, sockets, lambda address: print(lines(address), flush=True))


def _served(loaded: LoadedModel, name: str | None) -> ServedModel:
    return ServedModel(
        name=name or loaded.name,
        created=int(time.time()),
        tokenizer=loaded.tokenizer,
        chat_template=loaded.chat_template,
        max_model_len=loaded.max_model_len,
        fingerprint=loaded.fingerprint,
        drafters=loaded.speculation.drafters,
        vocab_size=min(loaded.spec.vocab_size, loaded.tokenizer.vocab_size),
        defaults=msgspec.convert(
            loaded.generation_defaults, GenerationDefaults, from_attributes=True
        ),
        num_kv_blocks=loaded.num_kv_blocks,
        kv_block_size=loaded.core.block_size,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
