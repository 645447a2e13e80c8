"""Training and generation on this machine: with `exporting`, all that knows torch."""

ENVIRONMENT = {  # what libraries read when they are loaded, unless the user has said otherwise
    # torch's threads meet after each of thousands of products a step, and spin for the last one: beside other work on the same
    # cores that takes their time from it. With some 30 us of it only, a step beside two busy processes takes 40 % of the time
    # (66 steps of the starter on two cores 44 s instead of 110 and 136), and one alone what it took.
    "GOMP_SPINCOUNT": "1000",
    "PYTORCH_ENABLE_MPS_FALLBACK": "1",  # an operation that Apple's GPU lacks is done on the CPU
}
