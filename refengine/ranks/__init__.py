"""One model on several ranks (processes): how they start, how they talk, and what each computes.

launcher   how this process was started: alone, by mpiexec, by torchrun
comm       the messages between ranks, over MPI, torch.distributed or threads
load       this rank's part of a checkpoint
engine     the engine of one rank
seats      which rank of ep holds which sequences of a batch
"""
