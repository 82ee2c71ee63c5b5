"""Parts of `scripts/accelerator_report.py`.

The command itself (`supervise`, `budget`, `results`, `tables`, `facts`) imports
no JAX, so that nothing that happens to an accelerator reaches it. What is
measured (`check_*`, `machine`, `sparse`, `rival`, `operations`, `models`,
`tiles`) runs in worker processes: each such module has functions from `Here`
to a list of `Job`s, which `stages` names in order of value.
"""
