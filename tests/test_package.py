import dlm_kernels


def test_version_matches_metadata():
    from importlib.metadata import version

    assert version("dlm_kernels") == dlm_kernels.__version__
