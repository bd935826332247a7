# Written by `make export` from notebooks/6_machines/02_shards.py: edit that file.

"""What a command says and does when several processes run it."""

__all__ = ["check_command", "in_group", "together"]


# imports of together
import contextlib
import os
import time
import traceback
import warnings

from llmnb.cli.__main__ import USER_ERRORS
from llmnb.cli.options import one_line
from llmnb.train.machines import check_alike, find_group
from llmnb.train.state import surroundings


# one speaks for all
@contextlib.contextmanager
def together(group):
    """Within, the first of several processes speaks; an error ends all.

    The error is one line that names the process. Where it befalls several,
    the first of them is some seconds ahead, and says it for the others. So
    ends also a process that exits within: the others would wait for it.

    Derived in chapter 6.2.
    """
    with contextlib.ExitStack() as quiet:
        if not group.first:
            nowhere = quiet.enter_context(
                open(os.devnull, "w", errors="replace")
            )
            quiet.enter_context(contextlib.redirect_stdout(nowhere))
            warnings.simplefilter("ignore")
        try:
            yield
        except BaseException as error:
            with contextlib.suppress(KeyboardInterrupt):  # a second one
                time.sleep(min(2 * group.rank, 6))
            bug = isinstance(error, Exception)
            bug = bug and not isinstance(error, USER_ERRORS)
            if bug or "LLMNB_TRACEBACK" in os.environ:
                traceback.print_exc()
            said = one_line(error)
            if isinstance(error, SystemExit):
                said = f"it has left with {said}"
            group.end(f"{group.name(group.rank)}: {said}")
            raise
        group.close()


# a command in a group
def in_group(args, work):
    """work(args, group) for the group of this process; what it returns.

    args: the values of a command's options, of which group says what kind.

    Derived in chapter 6.2.
    """
    group = find_group(args.group)
    if group.size == 1:
        return work(args, group)
    with together(group):
        return work(args, group)


def check_command(args, group, **facts):
    """Raise ValueError unless a group was given one command, and is alike.

    facts: more that has to be alike, of any kind; see `check_alike`. And
    unless MPI is enough: such a command has nothing on GPUs.

    Derived in chapter 6.2.
    """
    if args.group == "nccl":
        raise ValueError("--group nccl is for `llmnb train` on GPUs alone")
    facts = {name: str(value) for name, value in (args.given | facts).items()}
    check_alike(group, surroundings() | facts)
