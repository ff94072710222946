"""Checksums of memory, which both ends compute alike."""

import json

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tpcolocate.in_server.tpcolocate_receiver import checksums as module
from tpcolocate.in_server.tpcolocate_receiver.checksums import checksum, word_sum

pytestmark = [pytest.mark.quick, pytest.mark.timeout(60)]

WORD = 8
ROW = WORD * module._ROW_WORDS


def random_bytes(size, seed=0):
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_every_flipped_bit_of_small_data_changes_both_sums():
    for size in [*range(1, 18), 63, 64, 65]:
        data = random_bytes(size, seed=size)
        original = checksum(data)
        for bit in range(8 * size):
            data[bit // 8] ^= 1 << bit % 8
            assert all(was != now for was, now in zip(original, checksum(data))), (size, bit)
            data[bit // 8] ^= 1 << bit % 8


@given(st.integers(1, 5000), st.integers(0, 2**32), st.floats(0, 1, exclude_max=True))
def test_a_flipped_bit_of_any_data_changes_both_sums(size, seed, where):
    data = random_bytes(size, seed)
    before = checksum(data)
    bit = int(where * size * 8)
    data[bit // 8] ^= 1 << bit % 8
    assert all(was != now for was, now in zip(before, checksum(data)))


@pytest.mark.parametrize("fill", [0x00, 0xFF, 0x80])
@pytest.mark.parametrize("size", [ROW - 1, ROW, ROW + 1, 3 * ROW, 3 * ROW + 13])
def test_a_flipped_bit_at_every_seam_of_uniform_data_changes_both_sums(fill, size):
    data = torch.full((size,), fill, dtype=torch.uint8)
    before = checksum(data)
    seams = {0, 7, 8, size - 1, size - 8, size // 2, *(row * ROW + i for row in range(4) for i in (-8, -1, 0, 7, 8))}
    for byte in sorted(seam for seam in seams if 0 <= seam < size):
        for bit in (0, 7):
            data[byte] ^= 1 << bit
            assert all(was != now for was, now in zip(before, checksum(data))), (byte, bit)
            data[byte] ^= 1 << bit


def swap(data, one, other, length):
    moved = data.clone()
    moved[one : one + length], moved[other : other + length] = data[other : other + length], data[one : one + length]
    return moved


@given(st.integers(2, 6 * 1024), st.data())
def test_swapped_words_change_it(num_words, data):
    content = random_bytes(num_words * WORD + data.draw(st.integers(0, 7)), seed=num_words)
    one = data.draw(st.integers(0, num_words - 1))
    other = data.draw(st.integers(0, num_words - 1).filter(lambda word: word != one))
    assert checksum(swap(content, one * WORD, other * WORD, WORD)) != checksum(content)


@pytest.mark.parametrize("one, other, length", [
    (0, ROW, ROW), (0, 4 * ROW, ROW), (ROW, 3 * ROW, 2 * ROW),  # rows, which leaves the sums along them as they are
    (8, 8 + ROW, 8), (0, 512, 256), (0, 5 * ROW - 256, 256),  # columns, and what a bucket is aligned to
    (3, 1000, 100), (1, 2, 1), (0, 6 * ROW, 8), (5 * ROW + 8, 6 * ROW + 16, 24),  # not aligned; across the last full row
    (6 * ROW + 80, 6 * ROW + 81, 1),  # in the last, incomplete word
])  # fmt: skip
def test_swapped_blocks_change_it(one, other, length):
    content = random_bytes(6 * ROW + 83)
    content[one], content[one + length - 1] = 1, 1
    content[other] = 2  # what is swapped does differ
    assert checksum(swap(content, one, other, length)) != checksum(content)


@given(st.integers(1, 3 * ROW), st.integers(1, 3000))
def test_shifted_data_changes_it(size, by):
    content = random_bytes(size + by, seed=size)
    content[-1] = content[0] ^ 1
    assert checksum(torch.roll(content, by)) != checksum(content) or torch.equal(torch.roll(content, by), content)


@given(st.integers(0, 5000))
@example(0)
@example(7)
def test_it_is_a_function_of_the_bytes_alone(size):
    data = random_bytes(size, seed=size)
    found = checksum(data)
    assert found == checksum(data.clone()) and all(-(2**63) <= part < 2**63 for part in found)
    elsewhere = torch.zeros(size + 3 * 256, dtype=torch.uint8)
    elsewhere[256 : 256 + size] = data
    assert checksum(elsewhere[256 : 256 + size]) == found, "wherever they lie"
    assert json.loads(json.dumps(found)) == list(found)


def test_it_is_what_it_was():
    """Trainer and worker may run on different machines of one job: the sums are part of the protocol."""
    data = torch.arange(2 * ROW + 21, dtype=torch.int64).to(torch.uint8)
    by_row = by_column = 0
    content = bytes(data.tolist())
    word = lambda at: int.from_bytes(content[at : at + WORD], "little", signed=True)
    for row in range(2):
        for column in range(ROW // WORD):
            by_row += word(row * ROW + column * WORD) * (2 * row + 1)
            by_column += word(row * ROW + column * WORD) * (2 * column + 1)
    extra = sum(word(2 * ROW + i * WORD) * (2 * i + 1) for i in range(2))
    extra += sum(byte * (2 * (ROW // WORD + i) + 1) for i, byte in enumerate(content[2 * ROW + 16 :]))
    wrapped = [(total + 2**63) % 2**64 - 2**63 for total in (by_row + extra, by_column - extra)]
    assert list(checksum(data)) == wrapped


# --- sums of words -----------------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(1, 9), min_size=0, max_size=3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int8, torch.float64, torch.bool]),
    st.integers(0, 2**31),
)
def test_a_sum_of_words_is_the_same_however_the_memory_lies(shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(shape, generator=generator) * 99).to(dtype)
    wide = torch.zeros([*shape[:-1], 64] if shape else [64], dtype=dtype)
    inside = wide[..., 8 : 8 + shape[-1]] if shape else wide[8]
    inside.copy_(values)
    odd = torch.zeros(values.numel() + 1, dtype=dtype)[1:].view(shape)
    odd.copy_(values)
    expected = int(word_sum(values.clone()))
    assert int(word_sum(inside)) == int(word_sum(odd)) == expected
    if values.numel() > 1 and len(shape) > 1:
        turned = values.transpose(0, 1).contiguous().transpose(0, 1)
        assert int(word_sum(turned)) == expected


@given(st.integers(1, 300), st.integers(0, 2**31), st.floats(0, 1, exclude_max=True))
def test_a_flipped_bit_changes_a_sum_of_words(size, seed, where):
    data = random_bytes(size, seed)
    before = int(word_sum(data))
    bit = int(where * size * 8)
    data[bit // 8] ^= 1 << bit % 8
    assert int(word_sum(data)) != before
