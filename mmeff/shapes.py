"""The letters used in every shape of this library.

    B   batch                       N   tokens in a sequence (Nq queries, Nk keys where they differ)
    H   attention heads             Hk  key/value heads; H is a multiple of Hk (grouped-query attention)
    D   channels of one head        C   channels of a token (C = H * D)
    F   frames (after the patch embedding of a video model: latent frames)
    H, W in a grid (F, H, W)        rows and columns of tokens in a frame; the context tells them from heads
    V   visual tokens of a prompt   T   text tokens (appended last unless a host says otherwise)
    K   tokens kept                 L   layers
    R   chosen query rows           M   base rows of a BlockLayout (distinct block rows after sharing)
    nQ, nK   query blocks and key blocks of a layout

Attention tensors are heads-last, (B, N, H, D). Log-sum-exp is natural-log float32, (B, H, N).
"""
