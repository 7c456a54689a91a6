"""Reward servers: `server` is one Ray actor, `pool` all of them as one object, `http` the pool's face to the network.

`canaries` are pairs that every server is asked about now and then, to see that it still judges as it did.
"""
