"""python -m titanmoe.train: parse, build a Trainer, run.

Exit codes: 0 done; 2 the user's mistake; 75 told to stop and saved, run me again; 1 anything else.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from titanmoe.config.errors import ConfigError
from titanmoe.config.resolve import resolve

DONE, FAILED, MISTAKE, TRY_AGAIN = 0, 1, 2, 75


def main(args: Sequence[str] | None = None) -> int:
    try:
        resolved = resolve(sys.argv[1:] if args is None else args)
        from titanmoe.metrics.terminal import configure_logging
        from titanmoe.trainer import NonFiniteError, StoppedUnsavedError, Trainer

        config = resolved.config
        configure_logging(int(os.environ.get("RANK", "0")), color=not config.metrics.disable_color_printing)
        for note in resolved.notes:
            logging.getLogger("titanmoe").info(note)
        if config.job.print_config:
            from titanmoe.config.render import to_toml

            logging.getLogger("titanmoe").info("resolved config:\n%s", to_toml(config))
        try:
            return DONE if Trainer(config).train() else TRY_AGAIN
        except (NonFiniteError, StoppedUnsavedError) as error:
            print(f"error: {error}", file=sys.stderr)
            return FAILED
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE


if __name__ == "__main__":
    sys.exit(main())
