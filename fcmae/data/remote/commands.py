"""Commands whose output is read like a file: ``pipe:COMMAND``.

A command runs only where the user typed it: :meth:`fcmae.config.commands.CheckpointConfig.merge_data` drops those of
checkpoints. It runs without a shell, so no name in it is more than an argument.
"""

import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

from fcmae.errors import RemoteError, UsageError
from fcmae.urls import PIPE

BLOCK = 32 * 2**20
"""Bytes that are read at once."""


@dataclass(frozen=True)
class Command:
    """A command, as the config has it.

    Args:
        text: ``pipe:`` and the program with its arguments, in quotes where they hold spaces.
    """

    text: str

    def __str__(self) -> str:
        return self.text

    def blocks(self) -> Iterator[bytes]:
        """Runs the command and gives its output. Raises UsageError if it cannot be started, RemoteError if it fails."""
        try:
            arguments = shlex.split(self.text.removeprefix(PIPE))
        except ValueError as error:
            raise UsageError(f"{self}: {error}") from error
        if not arguments:
            raise UsageError(f"{self} must name a program after {PIPE}")
        try:
            process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        except OSError as error:
            raise UsageError(f"{self} cannot be started: {error.strerror}; it runs without a shell") from error
        assert process.stdout is not None
        try:
            while block := process.stdout.read(BLOCK):
                yield block
            if code := process.wait():
                raise RemoteError(f"{self} ended with exit code {code}")
        finally:
            process.stdout.close()
            if process.poll() is None:
                process.kill()
                process.wait()
