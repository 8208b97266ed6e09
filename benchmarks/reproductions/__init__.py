"""What the papers show without their published weights, done again with memjax.

One module a figure. ``python -m benchmarks.reproductions.<name>`` computes it, writes
``results/reproduction-<name>.json`` and ``figures/reproduction-<name>.png``, and says of every
statement of the paper whether it holds here; ``python -m benchmarks.reproductions`` does all.
``--quick`` takes seconds instead of minutes, trains too little for the statements to hold, and
writes beside the others.
"""
