"""`python -m bench.check attention=<name> [attention.<key>=<value>] [plugins=[my_pkg]]`: the contract of a mechanism.

One line per check and pattern; exit status 0 when all is well, 1 when a check fails, 2 for a user's mistake.
"""

from __future__ import annotations

import argparse
from collections import Counter

from bench import errors
from bench.config import compose
from bench.errors import UserError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.check", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="attention=NAME, attention.KEY=VALUE, plugins=[PKG]"
    )
    parser.add_argument("--config-dir", help="folder with YAMLs of your own")
    parser.add_argument("--list", action="store_true", help="say what is checked, and stop")
    arguments = parser.parse_intermixed_args()
    choice = compose(arguments.overrides, arguments.config_dir)  # first: a mistake needs no torch

    import torch
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    from bench.contract import CHECKS, run

    if arguments.list:
        for check in CHECKS.values():
            print(f"{check.name:14}  {check.description}")
        return 0
    torch.set_num_threads(1)
    name, config = choice.names["attention"], choice.parts["attention"]
    try:
        factory = instantiate(config, _convert_="all")
    except InstantiationException as error:
        raise UserError(f"{config['_target_']} cannot be imported: {error.__cause__ or error}") from error
    outcomes = run(factory, name, config=config, plugins=choice.settings["plugins"])
    slots = max(len(outcome.pattern) for outcome in outcomes)
    for outcome in outcomes:
        start = f"{outcome.status}  {outcome.check:14}  {outcome.pattern:{slots}}  {outcome.seconds:5.2f} s"
        print(f"{start}  {outcome.detail}".rstrip())
    count = Counter(outcome.status for outcome in outcomes)
    seconds = sum(outcome.seconds for outcome in outcomes)
    print(f"{name}: {count['pass']} passed, {count['fail']} failed, {count['skip']} skipped in {seconds:.1f} s")
    return 1 if count["fail"] else 0


if __name__ == "__main__":
    errors.run(main)
