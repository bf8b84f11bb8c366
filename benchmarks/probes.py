"""Linear probes of every layer, the penalty chosen on a validation split, beside scikit-learn's LogisticRegression: same rows, same objective, in turns.

Command: python benchmarks/probes.py

13 layers of 576 features, 4,000 training texts, 1,000 test texts, 4 classes, 4 penalties. Features are synthetic: variance that falls with a power of
the direction, as in the states of a transformer, and classes that are easier to tell apart in later layers.
"""

from side_by_side import Round, Side, finish, measure, serve

LAYERS, TRAIN, TEST, FEATURES, CLASSES = 13, 4000, 1000, 576, 4
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)


def rows():
    """(x_train, y_train, x_test, y_test), features [layers, rows, features] in float32."""
    import numpy as np

    rng = np.random.default_rng(0)
    y = rng.integers(CLASSES, size=TRAIN + TEST)
    spectrum = np.arange(1, FEATURES + 1, dtype=np.float32) ** -0.75
    x = np.empty((LAYERS, len(y), FEATURES), np.float32)
    for layer in range(LAYERS):
        shows = (0.5 + 0.7 * layer / LAYERS) / np.sqrt(8) * (rng.random(FEATURES) < 0.25)
        centers = rng.standard_normal((CLASSES, FEATURES), dtype=np.float32) * shows
        directions = np.linalg.qr(rng.standard_normal((FEATURES, FEATURES)))[0]
        x[layer] = ((centers[y] + rng.standard_normal((len(y), FEATURES), dtype=np.float32)) * spectrum) @ directions
    return x[:, :TRAIN], y[:TRAIN], x[:, TRAIN:], y[TRAIN:]


def by_us() -> Round:
    import numpy as np

    from plasticity_jax.analysis.probes import fit_probes

    given = rows()

    def one_round():
        return {"accuracy": float(np.mean([probe.accuracy for probe in fit_probes(*given, l2=PENALTIES, seed=0, standardize=True)]))}

    return one_round


def by_scikit_learn() -> Round:
    import warnings

    import numpy as np
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.model_selection import train_test_split
    from sklearn.preprocessing import StandardScaler

    x_train, y_train, x_test, y_test = rows()
    fit_rows, held = train_test_split(np.arange(TRAIN), test_size=0.2, stratify=y_train, random_state=0)
    warnings.simplefilter("ignore")  # fits that use up their iterations

    def fitted(x, y, l2):
        scaler = StandardScaler().fit(x)
        return scaler, LogisticRegression(C=1 / (l2 * len(x)), max_iter=500).fit(scaler.transform(x), y)

    def one_round():
        found = []
        for x, x_new in zip(x_train, x_test):
            losses = {}
            for l2 in PENALTIES:
                scaler, model = fitted(x[fit_rows], y_train[fit_rows], l2)
                losses[l2] = log_loss(y_train[held], model.predict_proba(scaler.transform(x[held])))
            scaler, model = fitted(x, y_train, min(losses, key=losses.__getitem__))
            found.append(model.score(scaler.transform(x_new), y_test))
        return {"accuracy": float(np.mean(found))}

    return one_round


SIDES = {
    "scikit-learn": Side(by_scikit_learn),
    # With several BLAS threads, which wait for one another, it is many times slower wherever anything else runs.
    "scikit-learn, one thread": Side(by_scikit_learn, variables={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}),
    "plasticity_jax": Side(by_us),
    "plasticity_jax, newest": Side(by_us, "newest"),
}


def main() -> None:
    found = measure(SIDES, rounds=2)
    rows = [one.row(side, found["scikit-learn"]) for side, one in found.items()]
    heading = f"{LAYERS} layers x {len(PENALTIES)} penalties, {TRAIN:,} texts, {FEATURES} features, {CLASSES} classes"
    finish("Linear probes", {heading: rows})


if __name__ == "__main__":
    serve(SIDES)
    main()
