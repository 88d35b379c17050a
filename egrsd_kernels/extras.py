"""How to get what an optional part of the package needs."""


def how_to_install(extra: str) -> str:
    """The command for messages; ``extra`` is one of pyproject.toml's.

    The package is on no index: its bare name would bring whatever somebody publishes under it.
    """
    return f"pip install '.[{extra}]' in a checkout of egrsd_kernels"
