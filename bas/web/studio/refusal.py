"""What a request cannot have: the status and the line that the page shows where the mistake was made."""


class Refusal(Exception):
    """An answer other than success. `code` names the reason for the page, `field` the setting that is wrong."""

    def __init__(self, status: int, message: str, code: str = "refused", field: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.field = status, message, code, field

    def content(self) -> dict[str, str]:
        """Return the body of the answer."""
        field = {"field": self.field} if self.field else {}
        return {"code": self.code, "message": self.message, **field}


def missing(what: str) -> Refusal:
    """404: it is not here, or not any more."""
    return Refusal(404, f"{what} is not here", "missing")
