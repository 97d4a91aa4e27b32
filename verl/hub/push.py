"""Uploading a model to the hub with its card and scores: the work of `python3 -m verl.push_to_hub`."""

import argparse
from functools import partial
from pathlib import Path

from huggingface_hub import ModelCardData

from verl.checkpoint.hub import check_login, check_repo, upload_files
from verl.checkpoint.model_card import FILE_NAME
from verl.checkpoint.model_folder import weights_revision
from verl.errors import UserError
from verl.evaluation.published import NoScoresError, Own, Scores, find_scores, write_leaderboard
from verl.evaluation.records import name_of
from verl.hub.card import published_card
from verl.hub.contents import Contents, check_whole, read_contents
from verl.utils.console import exit_code_of, say
from verl.utils.logging import quiet_libraries

PROGRAM = "push_to_hub"
# Where eval_mteb.py writes unless it is told otherwise.
_RESULTS = Path("results")


def run_program(args: argparse.Namespace) -> int:
    """Check, show and upload as the arguments of `verl.push_to_hub` ask for; the exit code."""
    quiet_libraries()
    return exit_code_of(PROGRAM, partial(run, args))


def run(args: argparse.Namespace) -> None:
    if "/" not in args.repo:
        raise UserError(f"--repo={args.repo} must be OWNER/NAME")
    check_repo(args.repo, "--repo")
    contents = read_contents(args.model)
    own = check_whole(contents)
    settings, scores = own.settings, own_scores(args, contents, own)
    head, card = published_card(contents.folder, settings, args.license, args.repo, scores.entries if scores else [])
    show(args, contents, head, card, scores)
    if args.dry_run:
        say(f"{PROGRAM}: nothing was sent")
        return
    check_login()
    files: dict[str, Path | bytes] = {**contents.files, FILE_NAME: card.encode()}
    message = f"Upload {name_of(str(contents.folder))}"
    commit = upload_files(files, args.repo, message, private=args.private, revision=args.revision)
    say(f"{PROGRAM}: uploaded: {commit.commit_url}")
    if args.leaderboard and scores:
        paths = write_leaderboard(scores, args.leaderboard, args.repo, commit.oid, head)
        say(f"{PROGRAM}: wrote {len(paths)} results to {paths[0].parent}, for a pull request to mteb's results")


def own_scores(args: argparse.Namespace, contents: Contents, own: Own) -> Scores | None:
    """The scores that are published; None where none were asked for and there are none."""
    if args.results is None and args.leaderboard is None and not _RESULTS.is_dir():
        say("scores: none, as there is no folder of results here; --results gives one")
        return None
    try:
        return find_scores(args.results or _RESULTS, weights_revision(contents.folder), own)
    except NoScoresError as error:
        if args.results is not None or args.leaderboard is not None:
            raise
        say(f"scores: none: {error}")
        return None


def show(
    args: argparse.Namespace, contents: Contents, head: ModelCardData, card: str, scores: Scores | None
) -> None:  # fmt: skip
    """Print what is uploaded where, what is not, and the card."""
    sizes = {name: file.stat().st_size for name, file in contents.files.items()} | {FILE_NAME: len(card.encode())}
    where = f"{args.repo} ({'private' if args.private else 'public if it is new'}), branch {args.revision or 'main'}"
    say(f"to {where}: {len(sizes)} files, {sum(sizes.values()) / 1e6:,.1f} MB, from {contents.folder}")
    for name, size in sorted(sizes.items()):
        say(f"  {name:44} {size:>16,}")
    if contents.left_out:
        say("left out:")
    for name, size in sorted(contents.left_out.items()):
        say(f"  {name:44} {size:>16,}")
    if scores:
        say(f"scores: {', '.join(scores.tasks)}, from {scores.folder}")
    if scores and scores.others:
        say(f"  left out, as mteb does not have them or has other data: {', '.join(scores.others)}")
    if head.base_model is None:
        say(f"base_model: none; a hub name can be written at the head of {contents.folder / FILE_NAME}")
    say(f"{FILE_NAME}:\n{card}")
