"""What is compared: a method on its own, or after EMBER. How profiles key it, tables name it, figures colour it."""

from typing import NamedTuple

UNEDITED = "none"  # stands where a method would: the model as it is
_COLOURS = {
    "ember": "#444444", "snmf": "#0072B2", "rmu": "#D55E00", "crisp": "#009E73", "pisces": "#CC79A7",
    "mean_rows": "#E69F00", "random_direction": "#56B4E9", "matched_rows": "#8C510A", "zero_rows": "#117733",
    "leace": "#332288", "random_rows": "#AAAAAA",
}  # fmt: skip


class Arm(NamedTuple):
    """A method, and whether EMBER's edit goes before it."""

    method: str
    ember: bool = False

    @property
    def key(self) -> str:
        """How profiles write it: ``none`` (the unedited model), ``rmu``, ``ember+rmu``."""
        return f"ember+{self.method}" if self.ember else self.method

    @property
    def name(self) -> str:
        """How a reader knows it: ``unedited``, ``RMU``, ``EMBER + RMU``; acronyms in capitals, controls in words."""
        if self.method == UNEDITED:
            return "unedited"
        name = self.method.replace("_", " ") if "_" in self.method else self.method.upper()
        return f"EMBER + {name}" if self.ember else name

    @property
    def colour(self) -> str:
        """The method's colour in every figure, safe for colour-blind readers."""
        return _COLOURS.get(self.method, _COLOURS["ember"])
