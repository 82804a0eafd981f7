"""How a program, the numbers of a step and the pool of threads lie in memory: the indices that both sides agree on.

A *program* is a table of operations. Each is worked on in *tiles*, which any thread may take: tile `t` of the operations
taken together has the ticket `t`, threads draw tickets in order, and a tile waits until all tiles before its operation's
`AFTER` are done. What a tile computes does not depend on who computes it, so results are the same bits for any number of
threads that work at a program; how it is cut into tiles, when it is made, goes by how many there may be then.
"""

# the control block of one program, in int64; what threads write at once lies 64 bytes apart
NEXT, DONE, FLAGS = 0, 8, 16
TOTAL, OPERATIONS, GEMM, WIDE, NUMBERS, YIELD, LOCAL, DATA = range(24, 32)
# LDX and LENGTH say how X lies, the others are NumPy's array objects, whose data are where DATA says
X, LDX, Y, ORDER, WEIGHTS, LENGTH = range(32, 38)
CONTROL = 40

# an operation, in int64
CODE, FIRST, TILES, AFTER = range(4)
FIELDS = 20
TAKE, FORWARD, ACTIVATION, LOSS, ACTIVATION_GRADIENT, WEIGHT_GRADIENT, INPUT_GRADIENT, LOOK, JUDGE, UPDATE = range(10)
NORMALIZE, NORMALIZE_WEIGHT_GRADIENT, NORMALIZE_INPUT_GRADIENT, DROP = range(10, 14)

# activations, losses and rules
NONE, RELU, TANH, SIGMOID, SILU, GELU_TANH, GELU = range(7)
IDS, ROWS, SQUARED, BINARY = range(4)
PLAIN, MOMENTUM, ADAM = range(3)

# the numbers of a step, in float64
VALUE, APPLY, SCALE, CLIP, GUARDED, CLOSED, FINITE, FACTOR = range(8)
RULE = 8  # and the scalars of the rule from there on
COUNT = 24

# the pool, in int64; the mutex and the condition are where the system keeps them
GENERATION, INSIDE, JOB, PLACES, SLEEPING = 0, 8, 16, 24, 32
LOCK, UNLOCK, WAIT, WAKE, PATIENCE = range(40, 45)
MUTEX, CONDITION = 48, 64
POOL = 80
