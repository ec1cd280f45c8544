"""The folders below the data URL. A job finds there what another job has made, unless a flag names another place."""

from dataclasses import dataclass

from lib.config import absolute_url
from lib.storage import join


@dataclass(frozen=True)
class Layout:
    """The usual places below a data URL; each is absolute.

    Raises:
        UserError: a place asked for lies below a relative path that would vanish with a submitted job.
    """

    data: str

    @property
    def url(self) -> str:
        """The data URL itself, as an absolute one."""
        return absolute_url(self.data, "--data")

    def photos(self, given: str | None = None) -> str:
        """Return where the photos are."""
        return self._place("photos", given, "--photos")

    def identities(self, given: str | None = None) -> str:
        """Return where the identities are, if they are in a file."""
        return self._place("identities.txt", given, "--identities")

    def faces(self, given: str | None = None) -> str:
        """Return where the faces table is."""
        return self._place("faces", given, "--faces")

    def runs(self) -> str:
        """Return the folder of the training runs."""
        return join(self.url, "runs")

    def sweeps(self) -> str:
        """Return the folder of the sweeps."""
        return join(self.url, "sweeps")

    def embeddings(self, model_name: str, given: str | None = None, flag: str = "--output") -> str:
        """Return where the embeddings by a model are."""
        return self._place(f"embeddings/{model_name}", given, flag)

    def output(self, name: str, given: str | None = None) -> str:
        """Return where a job writes, such as `matches`."""
        return self._place(name, given, "--output")

    def _place(self, name: str, given: str | None, flag: str) -> str:
        return join(self.url, name) if given is None else absolute_url(given, flag)
