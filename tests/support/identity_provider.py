"""`python -m tests.support.identity_provider PORT`: a provider of OpenID Connect, for tests.

Code flow with PKCE (S256), RS256 id tokens, discovery, keys, userinfo, logout. Everybody is let in
as the person of `POST /behave {"claims": {...}, "fault": ""}`; `fault` names what it does wrong.
"""

import base64
import hashlib
import json
import secrets
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlencode, urlsplit

import jwt
from cryptography.hazmat.primitives.asymmetric import rsa

CLIENT, SECRET = "portal", "the-client's-secret"
ALICE = {"sub": "alice-1", "email": "alice@example.org", "email_verified": True}


class Provider:
    def __init__(self, issuer: str):
        self.issuer, self.key, self.other = issuer, _key(), _key()
        self.codes: dict[str, dict] = {}
        self.behave({})

    def behave(self, told: dict) -> None:
        self.claims, self.fault = {**ALICE, **told.get("claims", {})}, told.get("fault", "")

    def discovery(self) -> dict:
        return {
            "issuer": "https://else.example" if self.fault == "other issuer" else self.issuer,
            "authorization_endpoint": f"{self.issuer}/authorize",
            "token_endpoint": f"{self.issuer}/token",
            "userinfo_endpoint": f"{self.issuer}/userinfo",
            "jwks_uri": f"{self.issuer}/keys",
            "end_session_endpoint": f"{self.issuer}/logout",
        }

    def keys(self) -> dict:
        public = jwt.algorithms.RSAAlgorithm.to_jwk(self.key.public_key(), as_dict=True)
        return {"keys": [{**public, "kid": "1", "alg": "RS256", "use": "sig"}]}

    def authorize(self, query: dict) -> str:
        """Where the browser goes back to."""
        assert query["client_id"] == CLIENT and query["response_type"] == "code"
        assert query["code_challenge_method"] == "S256"
        code = secrets.token_urlsafe(12)
        self.codes[code] = query
        back = {"code": code, "state": query["state"]}
        if self.fault == "denied":
            back = {"error": "access_denied", "state": query["state"]}
        return f"{query['redirect_uri']}?{urlencode(back)}"

    def token(self, form: dict, authorization: str) -> tuple[int, dict]:
        basic = base64.b64encode(f"{CLIENT}:{SECRET}".encode()).decode()
        query = self.codes.pop(form.get("code", ""), None)
        verifier = form.get("code_verifier", "").encode()
        challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier).digest()).rstrip(b"=")
        if (
            authorization != f"Basic {basic}"
            or query is None
            or challenge.decode() != query["code_challenge"]
            or form["redirect_uri"] != query["redirect_uri"]
        ):
            return 400, {"error": "invalid_grant"}
        if self.fault == "no token":
            return 200, {"access_token": "x"}
        return 200, {"access_token": "access", "id_token": self.id_token(query)}

    def id_token(self, query: dict) -> str:
        now = int(time.time())
        claims = {
            "iss": self.issuer, "aud": CLIENT, "iat": now, "exp": now + 300,
            "nonce": query["nonce"], **self.claims,
        }  # fmt: skip
        head, key, algorithm = {"kid": "1"}, self.key, "RS256"
        if self.fault == "wrong signature":
            key = self.other
        elif self.fault == "unsigned":
            key, algorithm = None, "none"
        elif self.fault == "signed with what is public":
            algorithm, key = "HS256", json.dumps(self.keys()["keys"][0]) * 2
        elif self.fault == "unknown key":
            head = {"kid": "2"}
        elif self.fault == "no kid":
            head = {}
        elif self.fault == "wrong nonce":
            claims["nonce"] = "x"
        elif self.fault == "no nonce":
            del claims["nonce"]
        elif self.fault == "wrong audience":
            claims["aud"] = "another"
        elif self.fault == "another's token":
            claims |= {"aud": [CLIENT, "another"], "azp": "another"}
        elif self.fault == "wrong issuer":
            claims["iss"] = "https://else.example"
        elif self.fault == "expired":
            claims |= {"iat": now - 9000, "exp": now - 3600}
        elif self.fault == "no end":
            del claims["exp"]
        elif self.fault == "no subject":
            del claims["sub"]
        elif self.fault == "garbage":
            return "a.b.c"
        return jwt.encode(claims, key, algorithm, head)

    def userinfo(self) -> dict:
        sub = "somebody-else" if self.fault == "another's userinfo" else self.claims["sub"]
        return {**self.claims, "sub": sub}


def _key():
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


class Handler(BaseHTTPRequestHandler):
    provider: Provider

    def do_GET(self):
        address = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(address.query).items()}
        match address.path:
            case "/.well-known/openid-configuration":
                self._say(200, self.provider.discovery())
            case "/keys":
                self._say(200, self.provider.keys())
            case "/userinfo":
                self._say(200, self.provider.userinfo())
            case "/authorize":
                self._say(302, {}, Location=self.provider.authorize(query))
            case _:
                self._say(200 if address.path == "/logout" else 404, query)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if self.path == "/behave":
            self.provider.behave(json.loads(body))
            return self._say(200, {})
        form = {name: values[0] for name, values in parse_qs(body).items()}
        self._say(*self.provider.token(form, self.headers.get("Authorization", "")))

    def _say(self, status: int, told: dict, **headers):
        body = json.dumps(told).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_arguments):
        pass


def main() -> None:
    port = int(sys.argv[1])
    Handler.provider = Provider(f"http://127.0.0.1:{port}")
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main()
