"""What the ``truffula bench`` commands measure with: loads, servers of ours and of others, and what is made of runs."""
