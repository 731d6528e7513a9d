"""What people open in a browser: the first page, and OHIF."""


def test_pages_for_people_load_nothing_from_elsewhere_and_are_not_framed(client):
    home = client.get("/")
    assert 'href="sam2sgp/"' in home.text and "http" not in home.text.replace("http-equiv", "")
    ohif = client.get("/ohif/")
    assert "OHIF" in ohif.text and client.get("/ohif/viewer/1.2.3").text == ohif.text
    for path in ("a" * 300, "a/" * 2000, "../../main.py", "..%2f..%2fmain.py", "app-config.js/x"):
        assert client.get(f"/ohif/{path}").status_code in (200, 400, 404)
    assert client.get("/ohif/app-config.js").headers["content-type"].startswith("text/javascript")
    for answer in (home, ohif):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
        assert (
            "http:" not in policy
            and "https:" not in policy
            and "unsafe-eval'" not in policy.replace("wasm-unsafe-eval'", "")
        )
        assert "script-src 'unsafe-inline'" not in policy
