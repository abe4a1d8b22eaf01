"""One command a module: ``add`` puts it into the parser, ``run`` is what it does.

They import what is heavy when they run: ``--help``, completion and ``fastalign doctor`` must not
wait for torch, nor need it.
"""
