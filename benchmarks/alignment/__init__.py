"""Does it align? Every method on tasks whose true reward is known: ``python -m benchmarks.alignment --grid quick``.

``cells.py`` names the cells, one training run each. ``experiment.py`` trains a cell and measures what came out:
``tasks.py`` (with ``moving_digits.py``) has its data, model and rewards, ``variants.py`` its loss, and
``gradient_variance.py`` measures how much its gradients vary. ``grid.py`` goes through many cells and keeps the results
file. ``estimates.py`` reads that file, ``claims.py`` and ``claims_conditions.py`` state what was found,
``conclusions.py`` reports it, and ``page_figures.py`` draws it.

Needs what ``sipo demo`` needs (``pip install 'sipo[demo]'``).
"""
