"""Why a step is limited, or what of it is out of range: short names as ``run.json`` has them, and words for people."""

LINEAR, LENGTH, OTHERS, LOSS = "linear", "length", "others", "loss"
WORDS = {
    LINEAR: "its loss rises far less than its slope says",
    LENGTH: "its delta gets far longer than the weights",
    OTHERS: "the loss of everything else rises with it",
    LOSS: "its loss rises no further",
}
