"""The digits the demo model and its judge are trained on."""

import torch

from difa_compile.demo.digits import IMAGE_SIZE, NUM_CLASSES, load_split, render, sample_batch


def test_splits_partition_the_data_set():
    train, held_out = load_split(held_out=False), load_split(held_out=True)
    assert len(train.labels) + len(held_out.labels) == 1797
    assert len(held_out.labels) == 359
    from sklearn.datasets import load_digits

    mine = torch.cat([train.digits, held_out.digits]).flatten(1).sum(0)
    torch.testing.assert_close(mine, torch.tensor(load_digits().data / 16).sum(0).float())


def test_splits_hold_every_class_in_unit_range():
    for held_out in (False, True):
        split = load_split(held_out)
        assert split.digits.shape[1:] == (1, 8, 8)
        assert split.digits.dtype == torch.float32
        assert split.digits.min() == 0
        assert split.digits.max() == 1
        assert split.labels.unique().tolist() == list(range(NUM_CLASSES))


def test_split_depends_on_its_seed_only():
    torch.manual_seed(1)
    first = load_split(True)
    torch.manual_seed(2)
    assert torch.equal(first.labels, load_split(True).labels)
    assert not torch.equal(first.labels, load_split(True, seed=1).labels)


def test_render_is_repeatable_and_each_drawing_differs():
    digit = load_split(True).digits[:1].expand(4, -1, -1, -1)
    images = render(digit, torch.Generator().manual_seed(3))
    assert images.shape == (4, 1, IMAGE_SIZE, IMAGE_SIZE)
    assert images.abs().max() <= 1
    assert torch.equal(images, render(digit, torch.Generator().manual_seed(3)))
    for other in images[1:]:
        assert (images[0] - other).abs().mean() > 0.05


def test_render_draws_ink_on_a_darker_textured_ground():
    split = load_split(True)
    images = render(split.digits, torch.Generator().manual_seed(0)).flatten(1)
    ink, ground = images.quantile(0.97, 1), images.quantile(0.2, 1)
    assert (ink > 0.4).float().mean() > 0.98
    assert (ground < 0).all()
    # Away from the digit the grating shows: no flat background.
    blank = render(torch.zeros(50, 1, 8, 8), torch.Generator().manual_seed(0))
    assert (blank.flatten(1).std(1) > 0.02).all()


def test_sample_batch_pairs_image_and_label():
    split = load_split(False)
    images, labels = sample_batch(split, 64, torch.Generator().manual_seed(5))
    assert images.shape == (64, 1, IMAGE_SIZE, IMAGE_SIZE)
    generator = torch.Generator().manual_seed(5)
    index = torch.randint(len(split.labels), (64,), generator=generator)
    assert torch.equal(labels, split.labels[index])
    assert torch.equal(images, render(split.digits[index], generator))
