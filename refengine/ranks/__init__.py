"""One model on several ranks (processes).

launcher   the launcher of this process (none, mpiexec or torchrun) and its rank
comm       collective operations between ranks, over MPI, torch.distributed or threads
load       loading this rank's part of a checkpoint
engine     the engine of one rank
seats      the assignment of the sequences of a batch to the ranks of ep
"""
