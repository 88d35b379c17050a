"""What a subcommand of ``egrsd`` is: a module with ``add_parser(subparsers)``; :mod:`egrsd_kernels.cli` lists them.

``add_parser`` adds the subcommand's parser and sets its default ``run`` to the function that takes the parsed
arguments and does the work. What is heavy to import belongs inside that function. A subcommand that sets a default
``overrides`` takes options that its parser does not know, and finds them there in their order.
"""


class CommandError(Exception):
    """The user's input is at fault; the message is the one line that ``egrsd`` prints before it exits with status 2."""
