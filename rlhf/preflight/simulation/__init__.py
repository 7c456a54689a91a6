"""`rlhf plan --simulate`: what another layout of a run would do, from what the run recorded of itself.

`recorded` (a run folder as numbers), `engine` (an engine that decodes a changing batch), `fit` (how fast engines and ranks are),
`scenario` (what is simulated), `events` (the loop as discrete events), `what_if` (the rows of the answer, words and JSON).
The schedule is the loop's own: `events` asks the loop's `Admission`, `Buffer` and `Refill`.
"""
