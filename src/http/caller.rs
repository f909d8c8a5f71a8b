//! Whose request it is: what the queue is shared among.

use std::{
    convert::Infallible,
    net::{IpAddr, Ipv6Addr, SocketAddr},
};

use axum::{
    extract::{ConnectInfo, FromRequestParts, Request},
    http::request::Parts,
};

use super::App;
use crate::engine::Client;

/// The client of a request: the key that it presents, else the address that it comes from.
pub(super) fn client(request: &Request, key: Option<usize>) -> Client {
    let address = request.extensions().get::<ConnectInfo<SocketAddr>>();
    match (key, address) {
        (Some(number), _) => Client::from(format!("key {number}")),
        (None, Some(ConnectInfo(peer))) => Client::from(network(peer.ip()).to_string()),
        (None, None) => Client::default(),
    }
}

/// An address, or what of it belongs to one client: who has an IPv6 network has all addresses of it.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() & (u128::MAX << 64)).into(),
        v4 => v4,
    }
}

/// The application, which asks the engine on behalf of the request's client.
pub(super) struct Caller(pub(super) App);

impl FromRequestParts<App> for Caller {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Infallible> {
        let client = parts.extensions.get::<Client>().cloned().unwrap_or_default();
        Ok(Self(app.on_behalf_of(client)))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_client_is_a_key_or_an_address_or_an_ipv6_network() {
        let of = |address: &str, key| {
            let mut request = Request::new(axum::body::Body::empty());
            let peer: SocketAddr = address.parse().unwrap();
            request.extensions_mut().insert(ConnectInfo(peer));
            client(&request, key)
        };
        assert_eq!(of("10.0.0.1:1", None), of("10.0.0.1:2", None));
        assert_ne!(of("10.0.0.1:1", None), of("10.0.0.2:1", None));
        assert_eq!(of("10.0.0.1:1", None), of("[::ffff:10.0.0.1]:1", None));
        assert_eq!(of("[fd00::1]:1", None), of("[fd00::ffff:2]:1", None));
        assert_ne!(of("[fd00::1]:1", None), of("[fd00:0:0:1::1]:1", None));
        assert_eq!(of("10.0.0.1:1", Some(0)), of("10.0.0.2:1", Some(0)));
        assert_ne!(of("10.0.0.1:1", Some(0)), of("10.0.0.1:1", Some(1)));
    }
}
