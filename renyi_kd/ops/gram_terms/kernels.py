r"""Both terms of the loss and the gradient of the relation maps, in fp64, with two launches forward and one backward.

With t, s, a, b the Grams of teacher's and student's relations, image features and mask tokens at unit diagonal, and
q_t = sum t^2, q_s = sum s^2, q_j = sum (a b t)^2, q_b = sum (t s)^2 over all n^2 entries, at alpha = 2:

    L_r = log2(q_j / q_t)         L_d = log2(q_t q_s / (q_b n^2))
    dL_r/dt = 2 t (a^2 b^2 / q_j - 1 / q_t) / ln 2
    dL_d/dt = 2 t (1 / q_t - s^2 / q_b) / ln 2          dL_d/ds = 2 s (1 / q_s - t^2 / q_b) / ln 2

or, as the Cauchy-Schwarz divergence, with q_c = sum t s and m = max(q_c, 2^-20 n):

    L_d = log2(q_t q_s / m^2) + 2 (1 - q_c / m) / ln 2
    dL_d/dt = 2 (t / q_t - s / m) / ln 2                dL_d/ds = 2 (s / q_s - t / m) / ln 2

or, debiased, with q_tt = sum t^4, q_ss = sum s^4, q_b as above, u = (q_b / q_tt)^1/2 and v = (q_b / q_ss)^1/2:

    L_d = log2(q_tt q_ss / q_b^2) / 2
    dL_d/dt = 2 t (u t - s) (u t + s) / (q_b ln 2)      dL_d/ds = 2 s (v s - t) (v s + t) / (q_b ln 2)

and with K the Gram before normalisation, t_ij = K_ij r_i r_j, r_i = K_ii^-1/2, H the gradient above off the diagonal:

    dK_ij = H_ij r_i r_j          dK_ii = -r_i^2 sum_j H_ij t_ij          dx_i = 2 sum_j dK_ij x_j

The Jensen-Rényi divergence of pairs needs no Gram, but x_i = <t_i, s_i>, t_i and s_i the maps of sample i of n, p_i and
r_i one over their norms, c_i = x_i p_i r_i, weights w_i, and the teacher's maps as constants:

    L_d = sum_i w_i (1 - log2(1 + c_i^2)) / n           g_i = -2 w_i / (n (1 + c_i^2) ln 2)
    ds_i = a_i t_i + b_i s_i                            a_i = g_i c_i p_i r_i        b_i = -g_i c_i^2 r_i^2

The forward makes partial Grams of stretches of both maps, and for pairs partial x beside the student's; one program
sums them (where they are many, a launch of its own does) and makes terms and the matrices 2 dK; the backward mixes the
maps by them. For pairs a and b are the diagonals of two matrices in place of both 2 dK of L_d. A sample with K_ii = 0
has r_i = 0. Extra memory: at most 8 MiB of partial Grams, and nine s x s matrices.

Maps in fp16, bf16 or fp32; contiguous; few samples; alpha = 2. First derivatives only.
"""

from __future__ import annotations

import triton
import triton.language as tl

from renyi_kd.ops.gram_terms.types import LEAST_PRODUCT

_LN_2 = tl.constexpr(0.6931471805599453)
_LEAST_PRODUCT = tl.constexpr(LEAST_PRODUCT)


@triton.jit
def _store_products(
    rows_ptr, gram_ptr, n_samples, n_columns, first_column, n_steps, BLOCK_S: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Store the products of all rows over n_steps stretches of their columns."""
    samples = tl.arange(0, BLOCK_S).to(tl.int64)
    in_s = samples < n_samples
    for i in range(n_samples):
        products = tl.zeros((BLOCK_S,), tl.float64)
        for step in range(n_steps):
            places = first_column + step * BLOCK_L + tl.arange(0, BLOCK_L)
            in_l = places < n_columns
            x = tl.load(
                rows_ptr + samples[:, None] * n_columns + places[None, :],
                mask=in_s[:, None] & in_l[None, :], other=0.0,
            )  # fmt: skip
            row = tl.load(rows_ptr + tl.cast(i, tl.int64) * n_columns + places, mask=in_l, other=0.0)
            # By way of fp32, which every dtype reaches.
            products += tl.sum(x.to(tl.float32).to(tl.float64) * row.to(tl.float32).to(tl.float64)[None, :], 1)
        tl.store(gram_ptr + i * n_samples + samples, products, mask=in_s)


@triton.jit
def _load_maps(maps_ptr, samples, places, inside, n_scores):
    """Return a tile of maps in fp64, by way of fp32, which every dtype reaches."""
    maps = tl.load(maps_ptr + samples[:, None] * n_scores + places[None, :], mask=inside, other=0.0)
    return maps.to(tl.float32).to(tl.float64)


@triton.jit
def _store_pair_products(
    teacher_ptr, student_ptr, products_ptr, n_samples, n_scores, first_column, n_steps,
    BLOCK_S: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Store the products of each sample's two maps over n_steps stretches."""
    samples = tl.arange(0, BLOCK_S).to(tl.int64)
    in_s = samples < n_samples
    products = tl.zeros((BLOCK_S,), tl.float64)
    for step in range(n_steps):
        places = first_column + step * BLOCK_L + tl.arange(0, BLOCK_L)
        inside = in_s[:, None] & (places < n_scores)[None, :]
        teacher = _load_maps(teacher_ptr, samples, places, inside, n_scores)
        products += tl.sum(teacher * _load_maps(student_ptr, samples, places, inside, n_scores), 1)
    tl.store(products_ptr + samples, products, mask=in_s)


@triton.jit
def _relation_grams_kernel(
    teacher_ptr, student_ptr, tokens_ptr, partial_ptr, n_samples, n_scores, n_token_columns, n_steps, part_stride,
    BLOCK_S: tl.constexpr, BLOCK_L: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Write partial Grams of a stretch of the teacher's maps, the student's or, where they are given, the tokens.

    For pairs the products of both models' maps are one more row of the student's.
    """
    first_column = tl.program_id(0).to(tl.int64) * n_steps * BLOCK_L
    matrix = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    gram_ptr = partial_ptr + matrix * part_stride
    if tl.program_id(1) == 0:
        _store_products(teacher_ptr, gram_ptr, n_samples, n_scores, first_column, n_steps, BLOCK_S, BLOCK_L)
    elif tl.program_id(1) == 1:
        _store_products(student_ptr, gram_ptr, n_samples, n_scores, first_column, n_steps, BLOCK_S, BLOCK_L)
        if PAIRS:
            _store_pair_products(
                teacher_ptr, student_ptr, gram_ptr + n_samples * n_samples,
                n_samples, n_scores, first_column, n_steps, BLOCK_S, BLOCK_L,
            )  # fmt: skip
    elif tokens_ptr is not None:
        _store_products(tokens_ptr, gram_ptr, n_samples, n_token_columns, first_column, n_steps, BLOCK_S, BLOCK_L)


@triton.jit
def _sum_parts(
    parts_ptr, gram_ptr, n_parts, part_stride, n_entries, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Write the sum of the first entries of partial Grams."""
    for first in range(0, n_entries, BLOCK_E):
        entries = first + tl.arange(0, BLOCK_E)
        total = tl.zeros((BLOCK_E,), tl.float64)
        for start in range(0, n_parts, BLOCK_K):
            parts = start + tl.arange(0, BLOCK_K)
            values = tl.load(
                parts_ptr + parts.to(tl.int64)[:, None] * part_stride + entries[None, :],
                mask=(parts < n_parts)[:, None] & (entries < n_entries)[None, :], other=0.0,
            )  # fmt: skip
            total += tl.sum(values.to(tl.float64), 0)
        tl.store(gram_ptr + entries, total, mask=entries < n_entries)


@triton.jit
def _store_scales(grams_ptr, scales_ptr, samples, n_samples):
    """Store one over the norms of the samples in each of the four Grams; 0 for a zero sample."""
    inside = samples < n_samples
    for gram in range(4):
        squares = tl.load(grams_ptr + (gram * n_samples + samples) * n_samples + samples, mask=inside, other=0.0)
        scale = tl.where(squares == 0, 0.0, 1.0 / tl.sqrt(tl.where(squares == 0, 1.0, squares)))
        tl.store(scales_ptr + gram * n_samples + samples, scale, mask=inside)


@triton.jit
def _unit(gram_ptr, scale_ptr, rows, columns, inside, n_samples):
    """Return a block of a Gram with unit diagonal, and the scale of its rows and columns; 0 for a zero sample."""
    row_scale = tl.load(scale_ptr + rows, mask=rows < n_samples, other=0.0)
    column_scale = tl.load(scale_ptr + columns, mask=columns < n_samples, other=0.0)
    gram = tl.load(gram_ptr + rows[:, None] * n_samples + columns[None, :], mask=inside, other=0.0)
    unit = gram * row_scale[:, None] * column_scale[None, :]
    diagonal = (rows[:, None] == columns[None, :]) & inside
    # NaN stays: it is not equal to itself.
    return tl.where(diagonal & (unit == unit), 1.0, unit), row_scale, column_scale


@triton.jit
def _through_unit_diagonal(grad, unit, row_scale, column_scale, diagonal):
    """Return twice the gradient of the raw Gram from that of the one with unit diagonal."""
    grad = tl.where(diagonal, 0.0, grad)
    diagonal_grad = -tl.sum(grad * unit, 1) * row_scale * row_scale
    return 2.0 * tl.where(diagonal, diagonal_grad[:, None], grad * row_scale[:, None] * column_scale[None, :])


@triton.jit
def _pair_terms(products_ptr, teacher_scale_ptr, student_scale_ptr, weight_ptr, samples, n_samples):
    """Return L_d of pairs, and how much of the teacher's map and of its own the gradient of a student's map has."""
    inside = samples < n_samples
    teacher_scale = tl.load(teacher_scale_ptr + samples, mask=inside, other=0.0)
    student_scale = tl.load(student_scale_ptr + samples, mask=inside, other=0.0)
    cosine = tl.load(products_ptr + samples, mask=inside, other=0.0) * teacher_scale * student_scale
    square = cosine * cosine
    share = tl.where(inside, 1.0 / tl.cast(n_samples, tl.float64), 0.0)
    if weight_ptr is not None:
        share *= tl.load(weight_ptr + samples, mask=inside, other=0.0).to(tl.float32).to(tl.float64)
    slope = -2.0 / _LN_2 * share / (1.0 + square)
    of_teacher = slope * cosine * teacher_scale * student_scale
    of_student = -slope * square * student_scale * student_scale
    return tl.sum(share * (1.0 - tl.log2(1.0 + square)), 0), of_teacher, of_student


@triton.jit
def _store_diagonal(matrix_ptr, values, samples, n_samples):
    """Store a matrix that is zero off its diagonal."""
    for row in range(n_samples):
        entries = tl.where(samples == row, values, 0.0)
        tl.store(matrix_ptr + row * n_samples + samples, entries, mask=samples < n_samples)


@triton.jit
def _gram_terms_fwd_kernel(
    image_parts_ptr, token_parts_ptr, teacher_parts_ptr, student_parts_ptr, weight_ptr, grams_ptr,
    loss_ptr, compression_ptr, distillation_ptr, teacher_unit_ptr, student_unit_ptr, mix_ptr,
    n_samples, n_image_parts, n_token_parts, n_relation_parts, lambda_r, lambda_d,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
    FORM: tl.constexpr, DETACH: tl.constexpr,
):  # fmt: skip
    """Write loss, L_r, L_d, both unit Grams, and twice dL_r/dK_T, dL_d/dK_T and dL_d/dK_S, by blocks of rows.

    For pairs the last two are diagonal: what a student's gradient has of the teacher's map and of its own.
    """
    size = n_samples * n_samples
    image_ptr, token_ptr = grams_ptr, grams_ptr + size
    teacher_ptr, student_ptr = grams_ptr + 2 * size, grams_ptr + 3 * size
    products_ptr, scales_ptr = grams_ptr + 4 * size, grams_ptr + 4 * size + n_samples
    image_scale_ptr, token_scale_ptr = scales_ptr, scales_ptr + n_samples
    teacher_scale_ptr, student_scale_ptr = scales_ptr + 2 * n_samples, scales_ptr + 3 * n_samples
    columns = tl.arange(0, BLOCK_S)
    in_columns = columns < n_samples
    # Of one part of relations, and of tokens where they have several.
    n_entries = size
    if FORM == "jensen_renyi":
        n_entries += n_samples
    _sum_parts(image_parts_ptr, image_ptr, n_image_parts, size, size, BLOCK_K, BLOCK_E)
    _sum_parts(token_parts_ptr, token_ptr, n_token_parts, n_entries, size, BLOCK_K, BLOCK_E)
    _sum_parts(teacher_parts_ptr, teacher_ptr, n_relation_parts, n_entries, size, BLOCK_K, BLOCK_E)
    _sum_parts(student_parts_ptr, student_ptr, n_relation_parts, n_entries, n_entries, BLOCK_K, BLOCK_E)
    # Those who read an entry are not the threads that wrote it.
    tl.debug_barrier()
    _store_scales(grams_ptr, scales_ptr, columns, n_samples)
    tl.debug_barrier()
    # Compression and distillation in loops of their own, so that fewer tiles are in registers at once.
    teacher_sums = tl.zeros((BLOCK_R,), tl.float64)
    joint_sums = tl.zeros((BLOCK_R,), tl.float64)
    for block in range(tl.cdiv(n_samples, BLOCK_R)):
        rows = block * BLOCK_R + tl.arange(0, BLOCK_R)
        inside = (rows < n_samples)[:, None] & in_columns[None, :]
        image, _, _ = _unit(image_ptr, image_scale_ptr, rows, columns, inside, n_samples)
        token, _, _ = _unit(token_ptr, token_scale_ptr, rows, columns, inside, n_samples)
        teacher, _, _ = _unit(teacher_ptr, teacher_scale_ptr, rows, columns, inside, n_samples)
        joint = image * token * teacher
        teacher_sums += tl.sum(teacher * teacher, 1)
        joint_sums += tl.sum(joint * joint, 1)
    q_teacher, q_joint = tl.sum(teacher_sums, 0), tl.sum(joint_sums, 0)
    compression = tl.log2(q_joint) - tl.log2(q_teacher)
    if FORM == "jensen_renyi":
        distillation, of_teacher, of_student = _pair_terms(
            products_ptr, teacher_scale_ptr, student_scale_ptr, weight_ptr, columns, n_samples
        )
        _store_diagonal(mix_ptr + size, of_teacher, columns, n_samples)
        _store_diagonal(mix_ptr + 2 * size, of_student, columns, n_samples)
    else:
        target_sums = tl.zeros((BLOCK_R,), tl.float64)
        student_sums = tl.zeros((BLOCK_R,), tl.float64)
        both_sums = tl.zeros((BLOCK_R,), tl.float64)
        for block in range(tl.cdiv(n_samples, BLOCK_R)):
            rows = block * BLOCK_R + tl.arange(0, BLOCK_R)
            inside = (rows < n_samples)[:, None] & in_columns[None, :]
            teacher, _, _ = _unit(teacher_ptr, teacher_scale_ptr, rows, columns, inside, n_samples)
            student, _, _ = _unit(student_ptr, student_scale_ptr, rows, columns, inside, n_samples)
            both = teacher * student
            if FORM == "debiased":
                # Each by the same operations: equal Grams give three equal sums, of which nothing is left.
                teacher, student = teacher * teacher, student * student
            target_sums += tl.sum(teacher * teacher, 1)
            student_sums += tl.sum(student * student, 1)
            if FORM == "cauchy_schwarz":
                both_sums += tl.sum(both, 1)
            else:
                both_sums += tl.sum(both * both, 1)
        q_target, q_student, q_both = tl.sum(target_sums, 0), tl.sum(student_sums, 0), tl.sum(both_sums, 0)
        distillation = tl.log2(q_target) + tl.log2(q_student)
        if FORM == "cauchy_schwarz":
            least = _LEAST_PRODUCT * tl.cast(n_samples, tl.float64)
            product = tl.maximum(q_both, least)
            distillation -= 2.0 * tl.log2(product)
            distillation += 2.0 / _LN_2 * (1.0 - q_both / product)
        elif FORM == "debiased":
            distillation = 0.5 * (distillation - 2.0 * tl.log2(q_both))
            target_ratio, student_ratio = tl.sqrt(q_both / q_target), tl.sqrt(q_both / q_student)
        else:
            distillation -= tl.log2(q_both)
            distillation -= 2.0 * tl.log2(tl.cast(n_samples, tl.float64))
    loss = lambda_r * compression + lambda_d * distillation
    tl.store(loss_ptr, loss.to(tl.float32).to(loss_ptr.dtype.element_ty))
    tl.store(compression_ptr, compression.to(tl.float32).to(loss_ptr.dtype.element_ty))
    tl.store(distillation_ptr, distillation.to(tl.float32).to(loss_ptr.dtype.element_ty))
    for block in range(tl.cdiv(n_samples, BLOCK_R)):
        rows = block * BLOCK_R + tl.arange(0, BLOCK_R)
        inside = (rows < n_samples)[:, None] & in_columns[None, :]
        diagonal = rows[:, None] == columns[None, :]
        places = rows[:, None] * n_samples + columns[None, :]
        image, _, _ = _unit(image_ptr, image_scale_ptr, rows, columns, inside, n_samples)
        token, _, _ = _unit(token_ptr, token_scale_ptr, rows, columns, inside, n_samples)
        teacher, row_scale, column_scale = _unit(teacher_ptr, teacher_scale_ptr, rows, columns, inside, n_samples)
        given = image * token
        grad = 2.0 / _LN_2 * teacher * (given * given / q_joint - 1.0 / q_teacher)
        mix = _through_unit_diagonal(grad, teacher, row_scale, column_scale, diagonal)
        tl.store(mix_ptr + places, mix, mask=inside)
        tl.store(teacher_unit_ptr + places, teacher, mask=inside)
    for block in range(tl.cdiv(n_samples, BLOCK_R)):
        rows = block * BLOCK_R + tl.arange(0, BLOCK_R)
        inside = (rows < n_samples)[:, None] & in_columns[None, :]
        diagonal = rows[:, None] == columns[None, :]
        places = rows[:, None] * n_samples + columns[None, :]
        student, student_row_scale, student_column_scale = _unit(
            student_ptr, student_scale_ptr, rows, columns, inside, n_samples
        )
        tl.store(student_unit_ptr + places, student, mask=inside)
        if FORM != "jensen_renyi":
            teacher, row_scale, column_scale = _unit(teacher_ptr, teacher_scale_ptr, rows, columns, inside, n_samples)
            if DETACH:
                grad = tl.zeros_like(teacher)
            elif FORM == "cauchy_schwarz":
                grad = 2.0 / _LN_2 / product * (teacher * (product / q_target) - student)
            elif FORM == "debiased":
                # As a product: of equal Grams the difference is zero, however it is contracted.
                grad = 2.0 / _LN_2 / q_both * teacher * (target_ratio * teacher - student)
                grad *= target_ratio * teacher + student
            else:
                grad = 2.0 / _LN_2 * teacher * (1.0 / q_target - student * student / q_both)
            mix = _through_unit_diagonal(grad, teacher, row_scale, column_scale, diagonal)
            tl.store(mix_ptr + size + places, mix, mask=inside)
            if FORM == "cauchy_schwarz":
                grad = 2.0 / _LN_2 / product * (student * (product / q_student) - teacher)
            elif FORM == "debiased":
                grad = 2.0 / _LN_2 / q_both * student * (student_ratio * student - teacher)
                grad *= student_ratio * student + teacher
            else:
                grad = 2.0 / _LN_2 * student * (1.0 / q_student - teacher * teacher / q_both)
            mix = _through_unit_diagonal(grad, student, student_row_scale, student_column_scale, diagonal)
            tl.store(mix_ptr + 2 * size + places, mix, mask=inside)


@triton.jit
def _gram_terms_bwd_kernel(
    teacher_ptr, student_ptr, mix_ptr, grad_loss_ptr, grad_compression_ptr, grad_distillation_ptr,
    grad_teacher_ptr, grad_student_ptr, n_samples, n_scores, lambda_r, lambda_d,
    BLOCK_S: tl.constexpr, BLOCK_L: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one stretch of the teacher's or the student's maps.

    For pairs the matrices of L_d are diagonal, and the second of them mixes the teacher's maps into the student's
    gradient.
    """
    compression_weight = tl.zeros((), tl.float64)
    distillation_weight = tl.zeros((), tl.float64)
    if grad_loss_ptr is not None:
        grad_loss = tl.load(grad_loss_ptr).to(tl.float32).to(tl.float64)
        compression_weight += lambda_r * grad_loss
        distillation_weight += lambda_d * grad_loss
    if grad_compression_ptr is not None:
        compression_weight += tl.load(grad_compression_ptr).to(tl.float32).to(tl.float64)
    if grad_distillation_ptr is not None:
        distillation_weight += tl.load(grad_distillation_ptr).to(tl.float32).to(tl.float64)
    is_student = tl.program_id(1) == 1
    scores_ptr = teacher_ptr
    grad_ptr = grad_teacher_ptr
    if is_student:
        scores_ptr = student_ptr
        grad_ptr = grad_student_ptr
    size = n_samples * n_samples
    samples = tl.arange(0, BLOCK_S).to(tl.int64)
    places = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    in_s, in_l = samples < n_samples, places < n_scores
    grad = tl.zeros((BLOCK_S, BLOCK_L), tl.float64)
    n_mixed = n_samples
    if PAIRS:
        if is_student:
            own = mix_ptr + samples * (n_samples + 1)
            of_teacher = distillation_weight * tl.load(own + size, mask=in_s, other=0.0)
            of_student = distillation_weight * tl.load(own + 2 * size, mask=in_s, other=0.0)
            inside = in_s[:, None] & in_l[None, :]
            grad += of_teacher[:, None] * _load_maps(teacher_ptr, samples, places, inside, n_scores)
            grad += of_student[:, None] * _load_maps(student_ptr, samples, places, inside, n_scores)
        n_mixed = tl.where(is_student, 0, n_samples)
    for j in range(n_mixed):
        entries = mix_ptr + samples * n_samples + j
        if is_student:
            weights = distillation_weight * tl.load(entries + 2 * size, mask=in_s, other=0.0)
        else:
            weights = compression_weight * tl.load(entries, mask=in_s, other=0.0)
            if not PAIRS:
                weights += distillation_weight * tl.load(entries + size, mask=in_s, other=0.0)
        row = tl.load(scores_ptr + tl.cast(j, tl.int64) * n_scores + places, mask=in_l, other=0.0)
        grad += weights[:, None] * row.to(tl.float32).to(tl.float64)[None, :]
    tl.store(
        grad_ptr + samples[:, None] * n_scores + places[None, :], grad.to(tl.float32).to(grad_ptr.dtype.element_ty),
        mask=in_s[:, None] & in_l[None, :],
    )  # fmt: skip
