"""What the flags of `eval_mteb.py` offer. Imports neither mteb nor torch."""

ASK_ABOVE_HOURS = 6.0
SUITES = {
    "quick": "9 of the tasks of MTEB(eng, v1), of every type but retrieval",
    "nano": "NanoBEIR: 13 small retrieval tasks",
    "eng-v1": "MTEB(eng, v1): the 56 tasks of the paper",
    "eng-v2": "MTEB(eng, v2): 41 tasks",
}
