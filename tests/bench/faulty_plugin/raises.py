"""A module that cannot be imported."""

raise ZeroDivisionError("at import")


class Never:
    """Found by its source, never made."""

    def __init__(self, spec):
        pass
