"""The core of Cropr. Read it in this order:

1. ``schedule.py``: how many patch tokens are alive after each block.
2. ``tokens.py``: tokens and their places in the image.
3. ``scorer.py``: learned queries score tokens; an auxiliary task trains the queries.
4. ``reducers/``: a score for each token, and the selection of the tokens that stay (``base.select``). ``Cropr.forward``
   in ``select.py`` scores with ``FoldedScorer.forward``, one dot product a token, in training and inference alike.
5. ``fusion.py``: how pruned tokens come back.
6. ``model.py``: the host's blocks with reducers between them and the fusion at its place; ``prune`` builds it.

``methods.py`` lists reducers and fusions by name; ``backbones/`` adapts models of host libraries.
"""
